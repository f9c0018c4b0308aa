"""GPT-2, all of it, on torch alone. Reads and writes Hugging Face's names and files.

One of the two implementations of models/interface.py (models/causal_lm.py is the other). The model is that of
Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); nanoGPT's model.py is the short
version to read beside it. Here a batch is one packed row, so tensors are (T, D) without a batch dimension.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models import kernels, lora
from training.models.batch import Batch
from training.models.config_json import read_config
from training.models.decoder import GPT2Decoder
from training.plan.events import Failure

Param = nn.Parameter


@dataclass
class GPT2Config:
    """The shape of a GPT-2 under Hugging Face's names. `extra` is the rest of config.json, written back
    unchanged."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the context
    n_embd: int = 768  # D
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None = 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load(folder: str | Path) -> GPT2Config:
        values = read_config(folder)
        known = [name for name in GPT2Config.__dataclass_fields__ if name != "extra"]
        extra = {name: value for name, value in values.items() if name not in known}
        return GPT2Config(**{name: values[name] for name in known if name in values}, extra=extra)

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        fixed = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
        }
        return fixed | self.extra | own


def is_plain_gpt2(config: dict[str, Any]) -> bool:
    """Whether this module implements the model of a config.json. Rarely used options are left to
    transformers."""
    return (
        config.get("model_type") == "gpt2"
        and config.get("activation_function", "gelu_new") in ("gelu_new", "gelu_pytorch_tanh")
        and config.get("scale_attn_weights", True)
        and config.get("tie_word_embeddings", True)
        and not any(
            config.get(k)
            for k in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
        )
    )


class Linear(nn.Module):
    """y = x @ weight + bias. GPT-2's files store the weight as (in, out): transformers calls this Conv1D."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = Param(torch.empty(n_in, n_out))
        self.bias = Param(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (T, in) -> (T, out)
        y: Tensor = kernels.Linear.apply(x, self.weight, self.bias)
        return y


class LayerNorm(nn.Module):
    """Normalizes each token over its D features, then scales and shifts."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = Param(torch.empty(D))
        self.bias = Param(torch.empty(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, D)
        y: Tensor = kernels.LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return y


class Attention(nn.Module):
    """Causal multi-head self-attention. One projection makes queries, keys and values."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.c_attn = Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = Linear(c.n_embd, c.n_embd)
        self.c = c

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # (T, D) -> (T, D)
        qkv = self.c_attn(x)  # (T, 3D)
        dropout = self.c.attn_pdrop if self.training else 0.0
        # (T, D)
        y = kernels.attention(qkv, batch.bounds, batch.offsets, batch.longest, self.c.n_head, dropout)
        out: Tensor = self.c_proj(y)  # (T, D)
        return out


class MLP(nn.Module):
    """Two layers with GELU in its tanh form, as GPT-2 was trained with (arXiv 1606.08415)."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        inner = c.n_inner or 4 * c.n_embd
        self.c_fc = Linear(c.n_embd, inner)
        self.c_proj = Linear(inner, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (T, D) -> (T, 4D) -> (T, D)
        return y


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.attn = Attention(c)
        self.ln_2 = LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.mlp = MLP(c)
        self.c = c

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # (T, D) -> (T, D)
        dropout = self.c.resid_pdrop if self.training else 0.0
        x = x + kernels.dropout(self.attn(self.ln_1(x), batch), dropout)
        return x + kernels.dropout(self.mlp(self.ln_2(x)), dropout)


class Embeddings(nn.Module):
    """A table with one D-dimensional row per token or position; kernels.Embedding looks the rows up."""

    def __init__(self, rows: int, D: int) -> None:
        super().__init__()
        self.weight = Param(torch.empty(rows, D))


class GPT2(nn.Module):
    """Language model with tied input and output embeddings. Parameters have Hugging Face's names
    (`transformer.h.0.…`)."""

    gradient_checkpointing = False
    lora: dict[str, Any] | None = None  # rank, alpha, dropout, targets, once adapters are there

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": Embeddings(config.vocab_size, config.n_embd),
                "wpe": Embeddings(config.n_positions, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.layer_norm_epsilon),
            }
        )

    @property
    def context(self) -> int:
        return self.config.n_positions

    def set_dropout(self, p: float) -> None:
        self.config.embd_pdrop = self.config.attn_pdrop = self.config.resid_pdrop = p

    def add_lora(
        self,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] | None,
        seed: int = 0,
        use_dora: bool = False,
        use_rslora: bool = False,
    ) -> None:
        """Freezes the weights and adds adapters, in place; see models/lora.py."""
        self.lora = lora.add(self, rank, alpha, dropout, targets, seed, use_dora, use_rslora)

    def merged_weights(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name, adapters folded in."""
        return lora.merged_weights(self)

    def hidden(self, batch: Batch, all_tokens: bool = False) -> Tensor:
        """Final states of the positions that predict a trained token, (N, D), or of all tokens, (T, D), if
        `all_tokens`."""
        t: Any = self.transformer
        # token embedding + learned position embedding; positions restart at 0 in each document
        x = kernels.Embedding.apply(t["wte"].weight, t["wpe"].weight, batch.ids, batch.positions)  # (T, D)
        x = kernels.dropout(x, self.config.embd_pdrop if self.training else 0.0)
        for block in t["h"]:
            # Gradient checkpointing keeps only the input of each block and computes the rest again in the
            # backward pass (Chen et al., arXiv 1604.06174).
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, batch, use_reentrant=False)
            else:
                x = block(x, batch)
        # Only the N positions that the loss needs go through the last norm and the head: prompts cost
        # neither.
        states: Tensor = t["ln_f"](x if all_tokens else x[batch.loss_positions])
        return states

    def head(self) -> Tensor:
        """(V, D): the token embedding itself; GPT-2 ties the two (Press and Wolf, arXiv 1608.05859)."""
        t: Any = self.transformer
        weight: Tensor = t["wte"].weight
        return weight

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Writes the adapter as peft does; `base` names the model it belongs to."""
        assert self.lora is not None
        lora.save_adapter(self, self.lora, folder, base)

    def decoder(self, pack: bool = True) -> GPT2Decoder:
        return GPT2Decoder(self.merged_weights(), self.config.n_head, self.config.layer_norm_epsilon, pack)

    def merged(self) -> GPT2:
        """A model with the adapters merged, fp32, on the CPU. Unchanged weights are shared, not copied."""
        with torch.device("meta"):
            plain = GPT2(copy.copy(self.config))
        for name, weight in self.merged_weights().items():
            owner, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(owner), attribute, Param(weight.float().cpu(), requires_grad=False))
        return plain

    # ---- files ---------------------------------------------------------------------------------------------

    @staticmethod
    def new(config: GPT2Config, seed: int = 0) -> GPT2:
        """Random weights with GPT-2's initialization: N(0, 0.02), norms 1, biases 0. The same `seed` gives
        the same weights."""
        model = GPT2(config)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                elif ".ln_" in name:
                    p.fill_(1.0)
                else:
                    # scaled down by sqrt(number of residual additions), two per layer
                    deep = name.endswith("c_proj.weight")
                    p.normal_(0.0, 0.02 / (math.sqrt(2 * config.n_layer) if deep else 1.0), generator=rng)
        return model

    @staticmethod
    def load(folder: str | Path) -> GPT2:
        """Reads config.json and model.safetensors (or its shards), fp32 on the CPU. Raises
        Failure("base_model").

        fp32 weights are memory-mapped: nothing is copied until they are written to."""
        config = GPT2Config.load(folder)
        # on the meta device parameters have shapes but no memory: they are replaced by the tensors of the
        # file
        with torch.device("meta"):
            model = GPT2(config)
        weights = _weights(Path(folder))
        for name, p in list(model.named_parameters()):
            # older files (OpenAI's own upload among them) leave out the prefix "transformer."
            tensor = weights.get(name, weights.get(name.removeprefix("transformer.")))
            if tensor is None or tensor.shape != p.shape:
                problem = (
                    "is missing"
                    if tensor is None
                    else f"has the shape {tuple(tensor.shape)}, not {tuple(p.shape)}"
                )
                raise Failure(
                    "base_model", f"The model in {folder} does not fit its config.json: {name} {problem}."
                )
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Param(tensor.float()))
        return model

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors as transformers would, adapters folded in."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: p.to("cpu", dtype).contiguous() for name, p in self.merged_weights().items()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        values = self.config.as_json() | {"dtype": str(dtype).removeprefix("torch.")}
        values.pop("torch_dtype", None)
        (Path(folder) / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    try:
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        weights: dict[str, Tensor] = {}
        for name in names:
            weights |= load_file(folder / Path(name).name)
        return weights
    except FileNotFoundError as error:
        raise Failure(
            "base_model",
            f"There are no safetensors weights in {folder} ({Path(str(error.filename or '')).name or 'model.safetensors'} is missing).",
        ) from None
    except SafetensorError as error:
        raise Failure("base_model", f"The weights in {folder} are damaged: {error}") from error
    except Exception as error:  # of the index: anything a JSON file can hold
        raise Failure("base_model", f"The weights in {folder} cannot be read: {error}") from error
