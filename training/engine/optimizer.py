"""AdamW over one flat buffer: weights, gradients and both means each lie in one piece of memory.

Every trained parameter becomes a window on the buffer, so clearing, measuring, clipping and updating are one pass each,
and several processes sum their gradients in one call. Backward passes add into `main_grad` windows (kernels.py).
With bf16 weights the flat weights are their fp32 masters, copied down after each step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.engine.distributed import Processes
from training.engine.memory import fresh
from training.plan.config import Settings

ALIGN = 16  # floats: every parameter begins on a cache line


class AdamW:
    sharded = False  # sharded.py has the one that is

    def __init__(self, model: nn.Module, settings: Settings, dtype: torch.dtype = torch.float32) -> None:
        """Takes the model's fp32 parameters over; with another `dtype` the model computes with copies of them."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named.sort(
            key=lambda item: item[1].dim() < 2
        )  # matrices are decayed; biases and norms stand behind them
        self.settings = settings
        self.params = dict(named)
        self.spans: dict[str, tuple[int, int]] = {}
        self.decayed = end = 0
        for name, p in named:
            self.spans[name] = (end, end + p.numel())
            end += -(-p.numel() // ALIGN) * ALIGN
            self.decayed = end if p.dim() >= 2 else self.decayed
        device = named[0][1].device
        self.weights = _zeros(end, device)  # fp32 masters
        self.grads = _zeros(end, device)
        self.mean = _zeros(end, device)  # AdamW's exp_avg
        self.square = _zeros(end, device)  # AdamW's exp_avg_sq
        self.steps = torch.zeros((), device=device)
        self.halves: list[tuple[Tensor, Tensor]] = []  # (bf16 parameter, its master)
        for name, p in named:
            master = self.window(self.weights, name)
            master.copy_(p.detach())
            p.main_grad = self.window(self.grads, name)  # type: ignore[attr-defined]  # ours, see kernels.main_grad
            p.data = master if dtype == torch.float32 else master.to(dtype)
            if dtype != torch.float32:
                self.halves.append((p.data, master))
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)

    def use_masters(self) -> None:
        """From here on the model computes with the fp32 weights themselves: for the export."""
        for name, p in self.params.items():
            p.data = self.window(self.weights, name)
        self.halves = []

    def window(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in its shape."""
        start, end = self.spans[name]
        return buffer[start:end].view(self.params[name].shape)

    def zero_grad(self) -> None:
        self.grads.zero_()

    def add_up(self, processes: Processes) -> None:
        """The gradients of all processes."""
        processes.add_up(self.grads)

    def grad_norm(self) -> float:
        return float(torch.linalg.vector_norm(self.grads))

    def step(self, lr: float, norm: float) -> None:
        """One update; `norm` is the gradient's, measured before, and must be finite. Clipping rides in the same pass."""
        s = self.settings
        self.steps += 1
        longer = norm / s.clip_norm if s.clip_norm else 1.0
        scale = torch.tensor(longer, device=self.grads.device) if longer > 1 else None
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

    # ---- state, by parameter name --------------------------------------------------------------------------------

    def weight_tensors(self) -> dict[str, Tensor]:
        return {name: self.window(self.weights, name) for name in self.spans}

    def state_tensors(self) -> dict[str, Tensor]:
        state = {f"exp_avg.{name}": self.window(self.mean, name) for name in self.spans}
        state |= {f"exp_avg_sq.{name}": self.window(self.square, name) for name in self.spans}
        return state | {"step": self.steps}

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Takes over what `weight_tensors` and `state_tensors` gave."""
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
        """As before the first step."""
        for buffer in (self.grads, self.mean, self.square, self.steps):
            buffer.zero_()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.params.items()}

    @property
    def parameters(self) -> int:
        return sum(end - start for start, end in self.spans.values())


def _zeros(count: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.frombuffer(fresh(4 * count), dtype=torch.float32)
    return torch.zeros(count, device=device)
