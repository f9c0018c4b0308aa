"""A model that fits into no single process: every process holds a part of each weight, gradient and mean (torch's FSDP2).

A layer's weights are gathered when it computes and let go afterwards. To the loop this is another optimizer: the face
is that of optimizer.AdamW. Whatever gathers (a row's forward and backward, `weight_tensors`, `state_tensors`) must be
called by all processes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from training.engine.device import Device
from training.engine.distributed import Processes
from training.models import kernels
from training.plan.config import Settings


class ShardedAdamW:
    sharded = True

    def __init__(self, model: nn.Module, settings: Settings, place: Device, processes: Processes) -> None:
        """Takes the model's fp32 weights, on the CPU, apart; each process keeps its share of them on its device."""
        self.settings, self.processes, self.place = settings, processes, place
        kernels.by_autograd = True  # FSDP2 adds up what autograd collects
        half = None if place.dtype == torch.float32 else place.dtype
        options: dict[str, Any] = {
            "mesh": init_device_mesh(place.device.type, (processes.size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
        }
        for layer in _layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(
                    1.0
                )  # losses are divided by all trained tokens of a step already
        self.params: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = torch.zeros((), device=place.device)

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def add_up(self, processes: Processes) -> None:
        """FSDP2 has added them up already."""

    def grad_norm(self) -> float:
        parts = [torch.linalg.vector_norm(_local(p.grad)) for p in self.params.values() if p.grad is not None]
        square = torch.stack(parts).double().square().sum()
        return float(self.processes.add_up(square).sqrt())

    def step(self, lr: float, norm: float) -> None:
        s = self.settings
        self.steps += 1
        longer = norm / s.clip_norm if s.clip_norm else 1.0
        scale = torch.tensor(longer, device=self.place.device) if longer > 1 else None
        for decayed in (True, False):
            names = [
                name
                for name, p in self.params.items()
                if (p.dim() >= 2) == decayed and p.grad is not None and _local(p).numel()
            ]
            if names:
                torch._fused_adamw_(
                    [_local(self.params[name]) for name in names],
                    [_local(self.params[name].grad) for name in names],
                    [_local(self.mean[name]) for name in names],
                    [_local(self.square[name]) for name in names],
                    [],
                    [self.steps] * len(names),
                    lr=lr,
                    beta1=s.beta1,
                    beta2=s.beta2,
                    weight_decay=s.weight_decay if decayed else 0.0,
                    eps=s.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=scale,
                )

    # ---- state, by parameter name; whole in the first process, empty in the others -------------------------------

    def weight_tensors(self) -> dict[str, Tensor]:
        return self._gathered(self.params)

    def state_tensors(self) -> dict[str, Tensor]:
        state = self._gathered({f"exp_avg.{name}": t for name, t in self.mean.items()})
        state |= self._gathered({f"exp_avg_sq.{name}": t for name, t in self.square.items()})
        return state | {"step": self.steps}

    def _gathered(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        whole = {}
        for name, part in parts.items():
            full = part.detach().full_tensor()
            if self.processes.leads:
                whole[name] = full.cpu()
        return whole

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self.load_weights(weights)
        for name in self.params:
            _fill(self.mean[name], state[f"exp_avg.{name}"])
            _fill(self.square[name], state[f"exp_avg_sq.{name}"])
        self.steps.copy_(state["step"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, p in self.params.items():
            _fill(p, weights[name])

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(p.shape) for name, p in self.params.items()}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.params.values())


def _layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer: the longest list of modules in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def _local(part: Any) -> Tensor:
    """What this process holds of it."""
    local: Tensor = part.detach().to_local()
    return local


def _fill(part: Any, whole: Tensor) -> None:
    whole = whole.to(part.device)
    mine = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
    _local(part).copy_(_local(mine))
