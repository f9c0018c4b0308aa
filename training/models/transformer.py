"""The decoder-only transformer of GPT-2, Llama and their relatives, all of it, on torch alone. Reads and writes
Hugging Face's names and files.

One of the two implementations of models/interface.py (models/causal_lm.py is the other). architecture.py says what
the families vary. nanoGPT's model.py and litgpt's are the short versions to read beside it. Here a batch is one
packed row, so tensors are (T, D) without a batch dimension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models import kernels, lora
from training.models.architecture import Architecture, Config, architecture_of, gpt2_config
from training.models.attention import Heads, attention
from training.models.batch import Batch
from training.models.config_json import read_config
from training.models.decoder import TransformerDecoder
from training.plan.events import Failure

Param = nn.Parameter
Rotation = tuple[Tensor, Tensor] | None  # cos and sin of each token, (T, 1, d / 2)


class Dropout:
    """The probabilities of a model, shared by its layers. They apply only while it is training."""

    def __init__(self) -> None:
        self.embedding = self.attention = self.residual = 0.0


class Linear(nn.Module):
    """y = x @ weight.T + bias, or x @ weight + bias for GPT-2, which stores its weights as (in, out)."""

    def __init__(self, n_in: int, n_out: int, bias: bool, out_in: bool) -> None:
        super().__init__()
        self.out_in = out_in
        self.weight = Param(torch.empty(n_out, n_in) if out_in else torch.empty(n_in, n_out))
        self.bias = Param(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (T, in) -> (T, out)
        y: Tensor = kernels.Linear.apply(x, self.weight, self.bias, self.out_in)
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


class RMSNorm(nn.Module):
    """Divides by the root mean square of the features, then scales."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = Param(torch.empty(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (…, D) -> (…, D)
        y: Tensor = kernels.RMSNorm.apply(x, self.weight, self.eps)
        return y


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, a: Architecture, layer: int, dropout: Dropout) -> None:
        super().__init__()
        self.a, self.dropout, self.heads = a, dropout, Heads.of(a, layer)
        self.rotated = a.rotary is not None and layer not in a.unrotated
        sizes = [n * a.head_size for n in (a.heads, a.kv_heads, a.kv_heads)]
        sizes = sizes if len(a.names.qkv) == 3 else [sum(sizes)]
        for name, size in zip(a.names.qkv, sizes, strict=True):
            self.add_module(name, Linear(a.width, size, a.qkv_bias, a.out_in))
        out = Linear(a.heads * a.head_size, a.width, a.attention_out_bias, a.out_in)
        self.add_module(a.names.attention_out, out)
        if a.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(a.head_size, a.eps) for _ in range(2))

    def forward(self, x: Tensor, batch: Batch, rotation: Rotation) -> Tensor:  # (T, D) -> (T, D)
        # one tensor (T, (H + 2G) * d), or queries, keys and values
        parts = [getattr(self, name)(x) for name in self.a.names.qkv]
        if self.a.qk_norm:
            for i, norm in enumerate((self.q_norm, self.k_norm)):
                parts[i] = norm(parts[i].unflatten(1, (-1, self.a.head_size))).flatten(1)
        if self.rotated and rotation is not None:
            parts = [kernels.Rotary.apply(*parts, *rotation)]
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        y = attention(qkv, batch, self.heads, self.dropout.attention if self.training else 0.0)
        out: Tensor = getattr(self, self.a.names.attention_out)(y)
        return out


class MLP(nn.Module):
    """Two layers with GELU in its tanh form (arXiv 1606.08415), or three with a gate (SwiGLU)."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.a = a
        for name in a.names.up:
            self.add_module(name, Linear(a.width, a.inner, a.mlp_bias, a.out_in))
        self.add_module(a.names.down, Linear(a.inner, a.width, a.mlp_bias, a.out_in))

    def forward(self, x: Tensor) -> Tensor:  # (T, D) -> (T, I) -> (T, D)
        parts = [getattr(self, name)(x) for name in self.a.names.up]
        gelu = self.a.mlp == "gelu"
        inner = F.gelu(parts[0], approximate="tanh") if gelu else kernels.SwiGLU.apply(*parts)
        y: Tensor = getattr(self, self.a.names.down)(inner)
        return y


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, a: Architecture, layer: int, dropout: Dropout) -> None:
        super().__init__()
        self.a, self.dropout = a, dropout
        norm = LayerNorm if a.norm == "layer" else RMSNorm
        self.add_module(a.names.attention_norm, norm(a.width, a.eps))
        self.add_module(a.names.attention, Attention(a, layer, dropout))
        self.add_module(a.names.mlp_norm, norm(a.width, a.eps))
        self.add_module(a.names.mlp, MLP(a))

    def forward(self, x: Tensor, batch: Batch, rotation: Rotation) -> Tensor:  # (T, D) -> (T, D)
        names = self.a.names
        normed = getattr(self, names.attention_norm)(x)
        x = self._add(x, getattr(self, names.attention)(normed, batch, rotation))
        return self._add(x, getattr(self, names.mlp)(getattr(self, names.mlp_norm)(x)))

    def _add(self, x: Tensor, more: Tensor) -> Tensor:
        more = kernels.dropout(more, self.dropout.residual if self.training else 0.0)
        scale = self.a.residual_scale
        return x + more if scale == 1 else torch.add(x, more, alpha=scale)


class Embeddings(nn.Module):
    """A table with one D-dimensional row per token or position. kernels.Embedding looks the rows up; the head
    multiplies with it."""

    def __init__(self, rows: int, D: int) -> None:
        super().__init__()
        self.weight = Param(torch.empty(rows, D))


class Transformer(nn.Module):
    """A causal language model. Parameters have Hugging Face's names (`transformer.h.0.…`, `model.layers.0.…`)."""

    gradient_checkpointing = False
    lora: dict[str, Any] | None = None  # what lora.add returns, once adapters are there

    def __init__(self, config: Config) -> None:
        """Parameters without values, for a config.json that `architecture_of` supports."""
        super().__init__()
        a = architecture_of(config)
        assert a is not None
        self.config = gpt2_config(**config) if config["model_type"] == "gpt2" else config
        self.a, self.dropout = a, Dropout()
        for key, place in a.dropouts:
            setattr(self.dropout, place, float(self.config.get(key) or 0.0))
        trunk: dict[str, nn.Module] = {a.names.embedding: Embeddings(a.vocabulary, a.width)}
        if a.rotary is None:
            trunk[a.names.positions] = Embeddings(a.context, a.width)
        trunk |= {
            a.names.layers: nn.ModuleList(Block(a, i, self.dropout) for i in range(a.layers)),
            a.names.norm: (LayerNorm if a.norm == "layer" else RMSNorm)(a.width, a.eps),
        }
        self.add_module(a.names.trunk, nn.ModuleDict(trunk))
        if not a.tied:
            self.lm_head = Embeddings(a.vocabulary, a.width)

    @property
    def context(self) -> int:
        return self.a.context

    @property
    def layers(self) -> int:
        return self.a.layers

    @property
    def attention_width(self) -> int:
        return self.a.heads * self.a.head_size

    def set_dropout(self, p: float) -> None:
        for key, place in self.a.dropouts:
            setattr(self.dropout, place, p)
            if self.config["model_type"] == "gpt2":
                self.config = self.config | {key: p}

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
        a, trunk = self.a, getattr(self, self.a.names.trunk)
        # Token embedding, plus a learned position embedding where there is one. Positions restart at 0 in
        # each document.
        positions = None if a.rotary else trunk[a.names.positions].weight
        table = trunk[a.names.embedding].weight
        x = kernels.Embedding.apply(table, positions, batch.ids, batch.positions)  # (T, D)
        x = x if a.embedding_scale == 1 else x * a.embedding_scale
        x = kernels.dropout(x, self.dropout.embedding if self.training else 0.0)
        rotation = a.rotary.tables(batch.positions, x.dtype) if a.rotary else None
        for block in trunk[a.names.layers]:
            # Gradient checkpointing keeps only the input of each block and computes the rest again in the
            # backward pass (Chen et al., arXiv 1604.06174).
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, batch, rotation, use_reentrant=False)
            else:
                x = block(x, batch, rotation)
        # Only the N positions that the loss needs go through the last norm and the head: prompts cost
        # neither.
        states: Tensor = trunk[a.names.norm](x if all_tokens else x[batch.loss_positions])
        return states if a.logit_scale == 1 else states * a.logit_scale

    def head(self) -> Tensor:
        """(V, D): the token embedding itself where the two are tied (Press and Wolf, arXiv 1608.05859)."""
        tied = getattr(self, self.a.names.trunk)[self.a.names.embedding]
        weight: Tensor = (tied if self.a.tied else self.lm_head).weight
        return weight

    def save_adapter(self, folder: str | Path, base: str) -> None:
        """Writes the adapter as peft does; `base` names the model it belongs to."""
        assert self.lora is not None
        lora.save_adapter(self, self.lora, folder, base)

    def decoder(self, pack: bool = True) -> TransformerDecoder:
        return TransformerDecoder(self.a, self.merged_weights(), pack)

    def merged(self) -> Transformer:
        """A model with the adapters merged, fp32, on the CPU. Unchanged weights are shared, not copied."""
        with torch.device("meta"):
            plain = Transformer(self.config)
        for name, weight in self.merged_weights().items():
            _set(plain, name, Param(weight.float().cpu(), requires_grad=False))
        return plain

    # ---- files ---------------------------------------------------------------------------------------------

    @staticmethod
    def new(config: Config, seed: int = 0) -> Transformer:
        """Random weights with GPT-2's initialization: N(0, 0.02), norms 1, biases 0. The same `seed` gives
        the same weights."""
        model = Transformer(config)
        a, rng = model.a, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.zero_()
                elif p.dim() == 1:
                    p.fill_(1.0)
                else:
                    # scaled down by sqrt(number of residual additions), two per layer
                    deep = name.endswith((f"{a.names.attention_out}.weight", f"{a.names.down}.weight"))
                    p.normal_(0.0, a.initial_std / (math.sqrt(2 * a.layers) if deep else 1.0), generator=rng)
        return model

    @staticmethod
    def load(folder: str | Path) -> Transformer:
        """Reads config.json and model.safetensors (or its shards), fp32 on the CPU. Raises
        Failure("base_model").

        fp32 weights are memory-mapped: nothing is copied until they are written to."""
        # on the meta device parameters have shapes but no memory: they are replaced by the tensors of the
        # file
        with torch.device("meta"):
            model = Transformer(read_config(folder))
        weights = _weights(Path(folder))
        for name, p in list(model.named_parameters()):
            # older files (OpenAI's own upload of GPT-2 among them) leave out the prefix "transformer."
            tensor = weights.get(name, weights.get(name.removeprefix(f"{model.a.names.trunk}.")))
            if tensor is None or tensor.shape != p.shape:
                problem = (
                    "is missing"
                    if tensor is None
                    else f"has the shape {tuple(tensor.shape)}, not {tuple(p.shape)}"
                )
                raise Failure(
                    "base_model", f"The model in {folder} does not fit its config.json: {name} {problem}."
                )
            _set(model, name, Param(tensor.float()))
        return model

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes config.json and model.safetensors as transformers would, adapters folded in."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: p.to("cpu", dtype).contiguous() for name, p in self.merged_weights().items()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        values = self.config | {"dtype": str(dtype).removeprefix("torch.")}
        values.pop("torch_dtype", None)
        (Path(folder) / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _set(model: nn.Module, name: str, parameter: Param) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)


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
