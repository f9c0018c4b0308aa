"""LoRA for models/transformer.py: small trained matrices next to frozen ones (Hu et al., arXiv 2106.09685). Other
models use peft.

y = x @ W.T + b + scale * (x @ A.T) @ B.T, with A (rank, in) random and B (out, rank) zero, so training starts
exactly at the base model. The scale is alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski, arXiv
2312.03732). With DoRA (Liu et al., arXiv 2402.09353) each output's weights also have a trained length. Files and
parameter names are those of peft, which loads what we save.
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
from training.plan.config import ALL_LINEAR, ATTENTION
from training.plan.events import Failure

ATTENTION_TARGETS = ("c_attn", "q_proj", "v_proj")  # peft's; GPT-2 has the first, later families the others


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """What the product of A and B is multiplied by."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def linear_layers(model: nn.Module, head: Tensor | None) -> list[str]:
    """Names of a model's linear layers but its head, whose weight is `head`, in the order of the model."""
    return [name for name, m in model.named_modules() if _is_linear(m) and m.weight is not head]


def short_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The last parts of the names of some modules, sorted, or the whole names if other modules end alike."""
    last = {name.rpartition(".")[2] for name in names}
    alike = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in last]
    return sorted(last if set(alike) == set(names) else names)


class LoRALinear(nn.Module):
    """A frozen Linear and its adapter."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: Any,
        rank: int,
        scale: float,
        dropout: float,
        rng: torch.Generator,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        # (out, in), or (in, out) in GPT-2; (out,) or None
        self.weight, self.bias, self.out_in = linear.weight, linear.bias, linear.out_in
        n_out, n_in = self.weight.shape if self.out_in else reversed(self.weight.shape)
        bound = 1 / math.sqrt(n_in)  # kaiming_uniform_ with a = sqrt(5), peft's default
        self.lora_A = Weight(torch.empty(rank, n_in).uniform_(-bound, bound, generator=rng))
        self.lora_B = Weight(torch.zeros(n_out, rank))
        self.scale, self.dropout = scale, dropout
        # (out,): DoRA's length of the weights of each output, those of the base model at first
        self.lora_magnitude_vector = Weight(self._lengths(self.weight.detach())) if use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        dropped = kernels.dropout(x, self.dropout) if self.training and self.dropout else None
        A, B = self.lora_A.weight, self.lora_B.weight
        w = self.weight.t() if self.out_in else self.weight  # (in, out)
        if self.lora_magnitude_vector is None:
            y: Tensor = LoRALinearFunction.apply(x, dropped, w, self.bias, A, B, self.scale)
            return y
        # No gradient goes through the present length (section 4.3 of the paper).
        y = LoRALinearFunction.apply(x if dropped is None else dropped, None, w, None, A, B, self.scale)
        y = Stretch.apply(y, self.lora_magnitude_vector.weight, self._lengths(self._sum()))
        y = y if self.bias is None else y + self.bias
        # As in peft, what dropout takes from the input is missing from the change of the output only.
        return y if dropped is None else y + affine(x - dropped, w)

    def _lengths(self, weight: Tensor) -> Tensor:
        """(out,): the L2 norm of each output's weights."""
        lengths: Tensor = torch.linalg.vector_norm(weight, dim=1 if self.out_in else 0)
        return lengths

    @torch.no_grad()
    def _sum(self) -> Tensor:
        """W + scale * B @ A, in W's layout."""
        A, B = self.lora_A.weight, self.lora_B.weight  # (r, in), (out, r)
        product = B @ A if self.out_in else A.t() @ B.t()
        return torch.add(self.weight, product.to(self.weight.dtype), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with the adapter folded in, in W's layout."""
        weight = self._sum()
        if self.lora_magnitude_vector is not None:
            factor = self.lora_magnitude_vector.weight / self._lengths(weight)
            weight *= factor[:, None] if self.out_in else factor
        return weight


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


class Stretch(kernels.Function):
    """y (T, out) * m / length, both (out,): DoRA's factor of each output. `length` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, length: Tensor) -> Tensor:
        ctx.m, factor = m, m / length
        ctx.save_for_backward(y, length, factor)
        return y * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (y, length, factor) = grads, ctx.saved_tensors
        dm = (dy * y).sum(0, dtype=torch.float32) / length
        return dy * factor, kernels.accumulate_grad(ctx.m, dm), None


def add(
    model: Any,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    seed: int = 0,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> dict[str, Any]:
    """Freezes a language model and adds adapters to its linear layers, in place: to all but the head if
    `targets` is ALL_LINEAR, to those of the attention if it is ATTENTION or None, otherwise to those whose name
    ends in one of `targets`.

    Returns a description: rank, alpha, dropout, targets, layers and so on. Raises Failure("bad_settings") if no
    layer has such a name."""
    linear = linear_layers(model, model.head())
    wanted = ATTENTION_TARGETS if tuple(targets or ATTENTION) == ATTENTION else tuple(targets or ())
    names = linear if wanted == ALL_LINEAR else [name for name in linear if _matches(name, wanted)]
    if not names:
        raise Failure(
            "bad_settings",
            f"lora_targets: no layer is named {', '.join(wanted)}.",
            f"Use {ALL_LINEAR[0]}, or some of {', '.join(short_names(model, linear))}.",
        )
    for p in model.parameters():
        p.requires_grad_(False)
    rng, scale = torch.Generator().manual_seed(seed), scale_of(rank, alpha, use_rslora)
    targets = short_names(model, names) if wanted == ALL_LINEAR else sorted(wanted)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, scale, dropout, rng, use_dora)
        setattr(model.get_submodule(parent), attribute, layer)
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "targets": targets,
        "layers": len(names),
        "of": len(linear),
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and hasattr(module, "bias")


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
        "use_dora": lora["use_dora"],
        "use_rslora": lora["use_rslora"],
        "target_modules": lora["targets"],
        # GPT-2 stores its weights as (in, out)
        "fan_in_fan_out": not any(layer.out_in for _, layer in lora_layers(model)),
        "bias": "none",
        "inference_mode": True,
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
