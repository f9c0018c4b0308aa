"""A packed row: what a model reads in one pass.

Whole documents stand one after the other without padding; positions restart in each, and attention stays inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """One packed row. T tokens of whole documents; N of them are trained."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, from 0 in each document
    bounds: list[tuple[int, int]]  # start and end of each document in the row
    where: Tensor  # (N,) int64: the tokens whose successor is trained
    targets: Tensor  # (N,) int64: those successors
    offsets: Tensor  # (documents + 1,) int32, `bounds` as kernels for several documents want them
    longest: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        move = [
            t.pin_memory().to(device, non_blocking=True)
            for t in (self.ids, self.positions, self.where, self.targets, self.offsets)
        ]
        return Batch(move[0], move[1], self.bounds, move[2], move[3], move[4], self.longest)


def pack(documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Documents (ids, mask) -> one row."""
    lengths = [len(ids) for ids, _ in documents]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    mask = np.concatenate([mask for _, mask in documents]).astype(bool)
    mask[starts[np.asarray(lengths) > 0]] = False
    targets = np.flatnonzero(mask)  # places of trained tokens; each is predicted from the place before it
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64))
    places = torch.from_numpy(targets)
    return Batch(
        ids=ids,
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        bounds=list(zip(starts.tolist(), ends.tolist(), strict=True)),
        where=places - 1,
        targets=ids[places],
        offsets=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest=max(lengths),
    )
