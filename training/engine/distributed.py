"""Several processes train one model: each computes its share of every step, and all hold the same weights.

`torchrun --nproc-per-node 2 -m training train CONFIG.json`. With one process every call here does nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    size: int = 1

    @staticmethod
    def join() -> Processes:
        """The process group that torchrun set up (WORLD_SIZE, RANK, …), or this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return Processes()
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return Processes(dist.get_rank(), size)

    @property
    def on_this_machine(self) -> int:
        """How many of the processes share this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    @property
    def leads(self) -> bool:
        """The first process emits events, evaluates and writes for all."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, by rank."""
        if self.size == 1:
            return [tensor]
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def least(self, number: int) -> int:
        """The smallest of the numbers of all processes."""
        device = "cuda" if self.size > 1 and torch.cuda.is_available() else "cpu"
        return min(int(part) for part in self.gather(torch.tensor(number, device=device)))

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
