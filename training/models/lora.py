"""LoRA for our GPT-2: small trained matrices beside frozen ones. Other models get peft's (causal_lm.py).

y = x @ W + b + (alpha / rank) * (x @ A.T) @ B.T, with A (rank, in) random and B (out, rank) zero, so that training
begins at the base model. Files and names are peft's, so peft loads what we save.
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
from training.models.kernels import give_product, product
from training.plan.events import Failure

DEFAULT_TARGETS = ("c_attn",)  # peft's for GPT-2


class Adapted(nn.Module):
    """A frozen Linear with its adapter."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, linear: nn.Module, rank: int, alpha: float, dropout: float, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.weight, self.bias = (
            linear.get_parameter("weight"),
            linear.get_parameter("bias"),
        )  # (in, out), (out,)
        n_in, n_out = self.weight.shape
        bound = 1 / math.sqrt(n_in)  # Kaiming's, as peft
        self.lora_A = Weight(torch.empty(rank, n_in).uniform_(-bound, bound, generator=rng))
        self.lora_B = Weight(torch.zeros(n_out, rank))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = kernels.dropout(x, self.dropout) if self.training and self.dropout else None
        return AdaptedLinear.apply(
            x, dropped, self.weight, self.bias, self.lora_A.weight, self.lora_B.weight, self.scale
        )

    def merged(self) -> Tensor:
        """(in, out): what the layer multiplies with, as one matrix."""
        product = self.lora_A.weight.t() @ self.lora_B.weight.t()
        return torch.add(self.weight, product.to(self.weight.dtype), alpha=self.scale).detach()


class Weight(nn.Module):
    """So that the parameter is called `lora_A.weight`, as peft calls it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class AdaptedLinear(torch.autograd.Function):
    """x (T, in), dropped (T, in) or None = x, w (in, out), b (out,), A (r, in), B (out, r) -> (T, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, w: Tensor, b: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        z = (x if dropped is None else dropped) @ A.t()  # (T, r)
        ctx.w, ctx.A, ctx.B, ctx.scale, ctx.separate = w, A, B, scale, dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, z)
        return product(x, w, b).addmm_(z, B.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (x, z), A, B = grads, ctx.saved_tensors, ctx.A, ctx.B
        dz = (dy @ B).mul_(ctx.scale)  # (T, r)
        dA, dB = give_product(A, dz.t(), x), give_product(B, dy.t(), z, ctx.scale)
        dx = dropped = None
        if ctx.separate:
            dx, dropped = product(dy, ctx.w.t()), dz @ A
        elif ctx.needs_input_grad[0]:
            dx = product(dy, ctx.w.t()).addmm_(dz, A)
        return dx, dropped, None, None, dA, dB, None


def add(
    model: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None, seed: int = 0
) -> dict[str, Any]:
    """Freezes the model and puts adapters beside the linear layers whose name ends in one of `targets`.

    Returns what was done: {"rank", "alpha", "dropout", "targets"}."""
    wanted = tuple(targets or DEFAULT_TARGETS)
    for p in model.parameters():
        p.requires_grad_(False)
    linear = [(name, m) for name, m in model.named_modules() if _is_linear(m) and _matches(name, wanted)]
    if not linear:
        raise Failure(
            "bad_settings",
            f"lora_targets: no layer is named {', '.join(wanted)}.",
            "Use c_attn, attn.c_proj, c_fc, mlp.c_proj or c_proj.",
        )
    rng = torch.Generator().manual_seed(seed)
    for name, module in linear:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Adapted(module, rank, alpha, dropout, rng))
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": sorted(wanted)}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and hasattr(module, "bias")


def _matches(name: str, wanted: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in wanted)


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, adapters folded in; only what has an adapter is copied."""
    folded = {f"{name}.weight": module.merged() for name, module in adapted(model)}
    plain = {name: p.detach() for name, p in model.named_parameters() if ".lora_" not in name}
    return plain | folded


def save_adapter(model: nn.Module, lora: dict[str, Any], folder: str | Path, base: str) -> None:
    """adapter_config.json and adapter_model.safetensors, for `peft.PeftModel.from_pretrained(base_model, folder)`."""
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
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
