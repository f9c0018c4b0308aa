"""Data parallelism: several processes train one model. Each computes its rows of every step; all hold the
same weights.

Start with `torchrun --nproc-per-node 2 -m training train CONFIG.json`. In a single process every call here
does nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's rank among `size` processes, and the collective operations between them."""

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
    def local_size(self) -> int:
        """How many of the processes run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1

    @property
    def is_main(self) -> bool:
        """Rank 0, which emits events, shows samples and writes checkpoints for all."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place. Every process must call it with the same shape."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, by rank."""
        if self.size == 1:
            return [tensor]
        import torch.distributed as dist

        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return parts

    def minimum(self, number: int) -> int:
        """The smallest of the processes' numbers. Also a barrier."""
        device = "cuda" if self.size > 1 and torch.cuda.is_available() else "cpu"
        return min(int(part) for part in self.gather(torch.tensor(number, device=device)))

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
