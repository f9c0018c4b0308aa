"""Training of a model that does not fit into a single process: each process holds a shard of every weight,
gradient and moment (torch's FSDP2).

FSDP2 is described in the TorchTitan paper (arXiv 2410.06511). A layer's weights are gathered when it computes
and freed afterwards. To the loop this is just another optimizer, with the interface of optimizer.AdamW.
Whatever gathers (the forward and backward pass of a row, `weight_tensors`, `state_tensors`) must be called by
all processes.
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

    def __init__(self, model: nn.Module, settings: Settings, device: Device, processes: Processes) -> None:
        """Shards the model's fp32 weights, which are on the CPU; each process keeps its shard on its
        device."""
        self.settings, self.processes, self.device = settings, processes, device
        kernels.by_autograd = True  # FSDP2 reduces the gradients that autograd collects
        half = None if device.dtype == torch.float32 else device.dtype
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.device.type, (processes.size,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
        }
        # Each block is a unit of its own, so only one block at a time is gathered in full.
        for layer in _layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "hidden")
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                # losses are divided by all trained tokens of a step already
                module.set_gradient_divide_factor(1.0)
        # DTensors: each holds the shard of this process
        self.params: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = torch.zeros((), device=device.device)

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def all_reduce_grads(self, processes: Processes) -> None:
        """Nothing to do: FSDP2 reduced them during the backward pass."""

    def grad_norm(self) -> float:
        """L2 norm over all parameters of all processes: each sums the squares of its shard."""
        parts = [torch.linalg.vector_norm(_local(p.grad)) for p in self.params.values() if p.grad is not None]
        square = torch.stack(parts).double().square().sum()
        return float(self.processes.all_reduce(square).sqrt())

    def step(self, lr: float, norm: float) -> None:
        s = self.settings
        self.steps += 1
        longer = norm / s.clip_norm if s.clip_norm else 1.0
        scale = torch.tensor(longer, device=self.device.device) if longer > 1 else None
        # as in optimizer.AdamW: matrices with weight decay, everything else without
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

    # ---- state, by parameter name; whole in the first process, empty in the others -------------------------

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
            if self.processes.is_main:
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
    """The blocks of a transformer: the longest ModuleList in it."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


def _local(part: Any) -> Tensor:
    """The shard that this process holds."""
    local: Tensor = part.detach().to_local()
    return local


def _fill(part: Any, whole: Tensor) -> None:
    whole = whole.to(part.device)
    mine = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
    _local(part).copy_(_local(mine))
