"""A packed row: what a model reads in one pass.

Whole documents follow each other without padding. Positions restart in each, and attention stays inside each:
sequence packing without cross-contamination (Krell et al., arXiv 2107.02027).
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
    positions: Tensor  # (T,) int64, counted from 0 in each document
    bounds: list[tuple[int, int]]  # start and end of each document in the row
    loss_positions: Tensor  # (N,) int64: the positions whose next token is trained
    targets: Tensor  # (N,) int64: those next tokens
    offsets: Tensor  # (documents + 1,) int32: `bounds` as variable-length attention kernels want them
    longest: int  # tokens of the longest document

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, copied through pinned memory so that the copy overlaps with computing."""
        if device.type == "cpu":
            return self
        move = [
            t.pin_memory().to(device, non_blocking=True)
            for t in (self.ids, self.positions, self.loss_positions, self.targets, self.offsets)
        ]
        return Batch(move[0], move[1], self.bounds, move[2], move[3], move[4], self.longest)


def pack(documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """One row of documents, each (ids (t,), mask (t,)): mask is 1 where the token is trained.

    The first token of a document is never trained: there is nothing to predict it from."""
    lengths = [len(ids) for ids, _ in documents]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    mask = np.concatenate([mask for _, mask in documents]).astype(bool)
    mask[starts[np.asarray(lengths) > 0]] = False
    # positions of the trained tokens; each is predicted from the position before it
    targets = np.flatnonzero(mask)
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64))
    places = torch.from_numpy(targets)
    return Batch(
        ids=ids,
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        bounds=list(zip(starts.tolist(), ends.tolist(), strict=True)),
        loss_positions=places - 1,
        targets=ids[places],
        offsets=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest=max(lengths),
    )
