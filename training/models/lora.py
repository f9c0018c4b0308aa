"""LoRA for models/transformer.py: small trained matrices next to frozen ones (Hu et al., arXiv 2106.09685). Other
models use peft.

y = x @ W.T + b + (alpha / rank) * (x @ A.T) @ B.T, with A (rank, in) random and B (out, rank) zero, so training
starts exactly at the base model. Files and parameter names are those of peft, which loads what we save.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.models import kernels
from training.models.kernels import accumulate_grad_product, affine
from training.plan.events import Failure

DEFAULT_TARGETS = ("c_attn", "q_proj", "v_proj")  # peft's; GPT-2 has the first, later families the others


class LoRALinear(nn.Module):
    """A frozen Linear and its adapter."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any, rank: int, alpha: float, dropout: float, rng: torch.Generator) -> None:
        super().__init__()
        # (out, in), or (in, out) in GPT-2; (out,) or None
        self.weight, self.bias, self.out_in = linear.weight, linear.bias, linear.out_in
        n_out, n_in = self.weight.shape if self.out_in else reversed(self.weight.shape)
        bound = 1 / math.sqrt(n_in)  # kaiming_uniform_ with a = sqrt(5), peft's default
        self.lora_A = Weight(torch.empty(rank, n_in).uniform_(-bound, bound, generator=rng))
        self.lora_B = Weight(torch.zeros(n_out, rank))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = kernels.dropout(x, self.dropout) if self.training and self.dropout else None
        w = self.weight.t() if self.out_in else self.weight  # (in, out)
        y: Tensor = LoRALinearFunction.apply(
            x, dropped, w, self.bias, self.lora_A.weight, self.lora_B.weight, self.scale
        )
        return y

    def merged(self) -> Tensor:
        """The weight with the adapter folded in, W + scale * B @ A, in W's layout."""
        A, B = self.lora_A.weight, self.lora_B.weight  # (r, in), (out, r)
        product = B @ A if self.out_in else A.t() @ B.t()
        return torch.add(self.weight, product.to(self.weight.dtype), alpha=self.scale).detach()


class Weight(nn.Module):
    """A module with one parameter, so that its name is `lora_A.weight`, as in peft."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class LoRALinearFunction(kernels.Function):
    """x (T, in), dropped (T, in) or None = x, w (in, out), b (out,) or None, A (r, in), B (out, r) -> (T, out).

    One Function instead of three matrix products under autograd: only the adapter's input and z are kept,
    and the gradients of A and B are added to `main_grad` by the products that compute them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        z = (x if dropped is None else dropped) @ A.t()  # (T, r), r much smaller than in and out
        ctx.w, ctx.A, ctx.B, ctx.scale, ctx.separate = w, A, B, scale, dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, z)
        return affine(x, w, b).addmm_(z, B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, z), A, B = grads, ctx.saved_tensors, ctx.A, ctx.B
        # y = x @ W + b + scale * z @ B.T and z = x @ A.T, so dz = scale * dy @ B,
        dz = (dy @ B).mul_(ctx.scale)  # (T, r)
        # dA = dz.T @ x, (r, in), and dB = scale * dy.T @ z, (out, r)
        dA, dB = accumulate_grad_product(A, dz.t(), x), accumulate_grad_product(B, dy.t(), z, ctx.scale)
        dx = dropped = None
        # with dropout the frozen product and the adapter have different inputs, so each gets a gradient of
        # its own
        if ctx.separate:
            dx, dropped = affine(dy, ctx.w.t()), dz @ A
        elif ctx.needs_input_grad[0]:
            dx = affine(dy, ctx.w.t()).addmm_(dz, A)
        return dx, dropped, None, None, dA, dB, None


def add(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None, seed: int = 0
) -> dict[str, Any]:
    """Freezes the model and adds adapters to the linear layers whose name ends in one of `targets`, in place.

    Returns {"rank", "alpha", "dropout", "targets"}. Raises Failure("bad_settings") if no layer has such a
    name."""
    layers = linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in layers})
    wanted = tuple(targets or [name for name in DEFAULT_TARGETS if name in names])
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = {name: layer for name, layer in layers.items() if _matches(name, wanted)}
    if not chosen:
        raise Failure(
            "bad_settings",
            f"lora_targets: no layer is named {', '.join(wanted)}.",
            f"Use one or more of: {', '.join(names)}.",
        )
    rng = torch.Generator().manual_seed(seed)
    for name, layer in chosen.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoRALinear(layer, rank, alpha, dropout, rng))
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": sorted(wanted)}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name (`model.layers.0.mlp.up_proj`). The head is none of them."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "out_in")}


def _matches(name: str, wanted: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in wanted)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every layer with an adapter."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights under their Hugging Face names, adapters folded in. Only weights with an adapter are
    copied."""
    folded = {f"{name}.weight": module.merged() for name, module in lora_layers(model)}
    plain = {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    return plain | folded


def save_adapter(model: nn.Module, lora: dict[str, Any], folder: str | Path, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained(base_model,
    folder)`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": p.detach().to("cpu", torch.float32).contiguous()
        for name, p in model.named_parameters()
        if ".lora_" in name
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"],
        # GPT-2 stores its weights as (in, out)
        "fan_in_fan_out": not any(layer.out_in for _, layer in lora_layers(model)),
        "bias": "none",
        "inference_mode": True,
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
