"""AdamW over one flat buffer: weights, gradients and both moments are each one contiguous piece of memory.

AdamW is Loshchilov and Hutter's (arXiv 1711.05101), computed by torch's fused kernel. Every trained parameter
is a view of the buffer, so clearing, measuring, clipping and updating take one pass each, and several
processes sum their gradients with one all-reduce. Backward passes add to the `main_grad` views
(models/kernels.py). With bf16 weights, the flat weights are their fp32 masters and are copied down after each
step (mixed precision as in Micikevicius et al., arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.engine.distributed import Processes
from training.engine.memory import zeroed
from training.plan.config import Settings

ALIGN = 16  # floats, 64 bytes: every parameter starts on a cache line


class AdamW:
    """The optimizer of a model that fits in one process. engine/fsdp.py has the same interface for sharded
    models."""

    sharded = False

    def __init__(self, model: nn.Module, settings: Settings, dtype: torch.dtype = torch.float32) -> None:
        """Moves the model's fp32 parameters into the buffer. With another `dtype` the model computes with
        copies of them."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Matrices first: they are one contiguous slice, and only they get weight decay (as in GPT-2 and
        # nanoGPT).
        named.sort(key=lambda item: item[1].dim() < 2)
        self.settings = settings
        self.params = dict(named)
        self.spans: dict[str, tuple[int, int]] = {}
        # name -> (start, end) in the buffer, in floats; `decayed` is the end of the matrices
        self.decayed = end = 0
        for name, p in named:
            self.spans[name] = (end, end + p.numel())
            end += -(-p.numel() // ALIGN) * ALIGN
            self.decayed = end if p.dim() >= 2 else self.decayed
        device = named[0][1].device
        self.weights = _zeros(end, device)  # fp32 masters
        self.grads = _zeros(end, device)  # fp32, summed over micro-batches
        self.mean = _zeros(end, device)  # exp_avg: mean of gradients
        self.square = _zeros(end, device)  # exp_avg_sq: mean of squared gradients
        # (), fp32: as the fused kernel wants it, for bias correction
        self.steps = torch.zeros((), device=device)
        self.halves: list[tuple[Tensor, Tensor]] = []  # (bf16 parameter, its master)
        for name, p in named:
            master = self.window(self.weights, name)
            master.copy_(p.detach())
            p.main_grad = self.window(self.grads, name)  # type: ignore[attr-defined]  # our attribute, see kernels.main_grad
            # From here on the parameter is a view of the buffer (fp32) or a copy in `dtype`.
            p.data = master if dtype == torch.float32 else master.to(dtype)
            if dtype != torch.float32:
                self.halves.append((p.data, master))
        # frozen weights (LoRA) need no master
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)

    def use_masters(self) -> None:
        """Makes the model compute with the fp32 masters themselves, for the export."""
        for name, p in self.params.items():
            p.data = self.window(self.weights, name)
        self.halves = []

    def window(self, buffer: Tensor, name: str) -> Tensor:
        """The view of a flat buffer that belongs to a parameter, in the parameter's shape."""
        start, end = self.spans[name]
        return buffer[start:end].view(self.params[name].shape)

    def zero_grad(self) -> None:
        self.grads.zero_()

    def all_reduce_grads(self, processes: Processes) -> None:
        """Sums the gradients of all processes, in place: one call for all parameters."""
        processes.all_reduce(self.grads)

    def grad_norm(self) -> float:
        """L2 norm over all parameters together, before clipping. The padding between parameters is always
        zero."""
        return float(torch.linalg.vector_norm(self.grads))

    def step(self, lr: float, norm: float) -> None:
        """One update with learning rate `lr`. `norm` is `grad_norm()` and must be finite.

        Gradients longer than clip_norm are scaled down to it (Pascanu et al., arXiv 1211.5063). The kernel
        divides them by grad_scale, so clipping needs no pass of its own."""
        s = self.settings
        self.steps += 1
        # how many times longer than allowed the gradient is
        longer = norm / s.clip_norm if s.clip_norm else 1.0
        scale = torch.tensor(longer, device=self.grads.device) if longer > 1 else None
        # two slices of the buffer: matrices with weight decay, everything else without
        for part, decay in ((slice(0, self.decayed), s.weight_decay), (slice(self.decayed, None), 0.0)):
            if self.weights[part].numel():
                torch._fused_adamw_(
                    [self.weights[part]],
                    [self.grads[part]],
                    [self.mean[part]],
                    [self.square[part]],
                    [],
                    [self.steps],
                    lr=lr,
                    beta1=s.beta1,
                    beta2=s.beta2,
                    weight_decay=decay,
                    eps=s.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )
        self._copy_down()

    def _copy_down(self) -> None:
        if self.halves:
            torch._foreach_copy_([half for half, _ in self.halves], [master for _, master in self.halves])

    # ---- state, by parameter name --------------------------------------------------------------------------

    def weight_tensors(self) -> dict[str, Tensor]:
        """The fp32 weights by parameter name: views, not copies."""
        return {name: self.window(self.weights, name) for name in self.spans}

    def state_tensors(self) -> dict[str, Tensor]:
        """Both moments by parameter name, and the step count: views, not copies."""
        state = {f"exp_avg.{name}": self.window(self.mean, name) for name in self.spans}
        state |= {f"exp_avg_sq.{name}": self.window(self.square, name) for name in self.spans}
        return state | {"step": self.steps}

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restores what `weight_tensors` and `state_tensors` returned, by parameter name."""
        for name, window in (self.weight_tensors()).items():
            window.copy_(weights[name])
        for name, window in self.state_tensors().items():
            window.copy_(state[name])
        self._copy_down()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, window in self.weight_tensors().items():
            window.copy_(weights[name])
        self._copy_down()

    def reset(self) -> None:
        """Clears gradients, moments and the step count: the state before the first step."""
        for buffer in (self.grads, self.mean, self.square, self.steps):
            buffer.zero_()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.params.items()}

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(end - start for start, end in self.spans.values())


def _zeros(count: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.frombuffer(zeroed(4 * count), dtype=torch.float32)
    return torch.zeros(count, device=device)
