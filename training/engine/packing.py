"""Examples, their order, and the packed rows a model reads.

A row is whole documents one after the other: no padding, positions that restart, attention that stays inside each
document. The order is a function of (seed, epoch) and a cursor counted in examples, so nothing but two numbers has
to be remembered to go on exactly where a crash left off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from training.plan.config import Settings


class Encoded(Protocol):
    """One encoded example, as `training.text.encode` makes it."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def mask(self) -> list[int]: ...


@dataclass
class Examples:
    """All examples end to end: `ids[starts[i]:starts[i + 1]]` is example i. Four bytes a token, not a Python list."""

    ids: np.ndarray  # (tokens,) int32
    mask: np.ndarray  # (tokens,) uint8: 1 where the token is trained
    starts: np.ndarray  # (examples + 1,) int64

    @staticmethod
    def of(encoded: Iterable[Encoded]) -> Examples:
        ids, mask, starts = [], [], [0]
        for example in encoded:
            ids.append(np.asarray(example.ids, np.int32))
            mask.append(np.asarray(example.mask, np.uint8))
            starts.append(starts[-1] + len(example.ids))
        empty = [np.zeros(0, np.int32)]
        return Examples(
            np.concatenate(ids or empty), np.concatenate(mask or empty).astype(np.uint8), np.asarray(starts)
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.starts[i], self.starts[i + 1])
        return self.ids[part], self.mask[part]

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def trained_tokens(self) -> int:
        return int(self.trained().sum())

    def trained(self) -> np.ndarray:
        """Tokens each example is trained on. The first of an example is never one: nothing stands before it."""
        before = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        whole = before[self.starts[1:]] - before[self.starts[:-1]]
        first = np.where(
            self.lengths > 0, self.mask[np.minimum(self.starts[:-1], max(len(self.mask) - 1, 0))], 0
        )
        return whole - first if len(self) else whole

    def take(self, which: Sequence[int] | np.ndarray) -> Examples:
        parts = [self[int(i)] for i in which]
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in parts])]).astype(np.int64)
        empty = np.zeros(0, np.int32)
        return Examples(
            np.concatenate([ids for ids, _ in parts] or [empty]),
            np.concatenate([mask for _, mask in parts] or [empty.astype(np.uint8)]),
            starts,
        )

    def hash(self) -> str:
        digest = hashlib.sha256()
        for part in (self.ids, self.mask, self.starts):
            digest.update(part.tobytes())
        return digest.hexdigest()


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """(training, held-out) examples. Which ones is decided by their content, so twins never stand on both sides."""
    wanted = round(len(examples) * fraction)
    if wanted == 0 or len(examples) < 2:
        return examples, examples.take([])
    keys = [
        hashlib.sha256(f"{seed}:".encode() + examples[i][0].tobytes()).digest() for i in range(len(examples))
    ]
    threshold = sorted(keys)[wanted - 1]
    held = np.array([key <= threshold for key in keys])
    if held.all():  # all alike
        return examples, examples.take([])
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


# ---- order ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch. A generator of its own, seeded by content, whatever else drew random numbers before."""
    key = hashlib.sha256(f"order:1:{seed}:{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big"))).permutation(count)


def example_at(cursor: int, seed: int, count: int) -> int:
    """Which example stands at `cursor` of the endless stream of epochs."""
    epoch, place = divmod(cursor, count)
    return int(permutation(seed, epoch, count)[place])


def plan_steps(
    lengths: np.ndarray,
    seed: int,
    *,
    epochs: float | None,
    max_steps: int | None,
    batch_size: int | None,
    batch_tokens: int | None,
) -> np.ndarray:
    """The cursor after each optimizer step, (steps,) int64. A step may straddle the end of an epoch; the last is what is left."""
    count = len(lengths)
    total = max(1, round(epochs * count)) if epochs is not None else None
    if batch_tokens is None:
        size = batch_size or 1
        steps = max_steps if max_steps is not None else -(-(total or 0) // size)
        ends = np.arange(1, steps + 1, dtype=np.int64) * size
        return np.minimum(ends, total) if max_steps is None and total is not None else ends
    ends_list: list[int] = []
    cursor = tokens = 0
    while (total is None or cursor < total) and (max_steps is None or len(ends_list) < max_steps):
        length = int(lengths[example_at(cursor, seed, count)])
        if tokens and tokens + length > batch_tokens:
            ends_list.append(cursor)
            tokens = 0
            continue
        tokens += length
        cursor += 1
    if tokens and (max_steps is None or len(ends_list) < max_steps):
        ends_list.append(cursor)
    return np.asarray(ends_list, np.int64)


# ---- rows ----------------------------------------------------------------------------------------------------------


def split(lengths: Sequence[int], limit: int, parts: int = 1) -> list[list[int]]:
    """Deal documents into rows of at most `limit` tokens (one document may exceed it, alone in its row).

    The number of rows is a multiple of `parts` where there are documents enough: one for each process."""
    wanted = max(1, -(-sum(lengths) // limit))
    wanted = -(-wanted // parts) * parts
    while True:
        rows: list[list[int]] = [[] for _ in range(min(wanted, len(lengths)))]
        filled = [0] * len(rows)
        for i in sorted(
            range(len(lengths)), key=lambda i: -lengths[i]
        ):  # longest first, each to the emptiest row
            row = filled.index(min(filled))
            rows[row].append(i)
            filled[row] += lengths[i]
        too_full = any(total > limit and len(row) > 1 for total, row in zip(filled, rows, strict=True))
        if not too_full or wanted >= len(lengths):
            return [sorted(row) for row in rows]
        wanted += parts


# ---- both together -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step takes, and the packed rows they are dealt into."""

    examples: Examples
    ends: np.ndarray  # (steps,) int64: the cursor after each step
    seed: int
    processes: int = 1  # rows of a step come in multiples of it, where there are examples enough

    @staticmethod
    def of(examples: Examples, settings: Settings, processes: int = 1) -> StepPlan:
        ends = plan_steps(
            examples.lengths,
            settings.seed,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
        )
        return StepPlan(examples, ends, settings.seed, processes)

    @property
    def steps(self) -> int:
        return len(self.ends)

    @property
    def tokens(self) -> int:
        """Tokens of all steps: whole epochs counted, the rest by the mean."""
        lengths = self.examples.lengths
        epochs, rest = divmod(int(self.ends[-1]), len(lengths))
        return int(lengths.sum() * epochs + lengths.mean() * rest)

    def end(self, step: int) -> int:
        """The cursor after optimizer step `step` (0 ≤ step < steps)."""
        return int(self.ends[step])

    def start(self, step: int) -> int:
        """The cursor before it."""
        return self.end(step - 1) if step else 0

    def rows(self, begin: int, end: int, limit: int) -> list[list[int]]:
        """Examples from cursor to cursor dealt into rows of at most `limit` tokens: numbers of examples."""
        which = [example_at(at, self.seed, len(self.examples)) for at in range(begin, end)]
        rows = split([int(self.examples.lengths[i]) for i in which], limit, self.processes)
        return [[which[i] for i in row] for row in rows]

    def fullest_row(self, limit: int) -> list[int]:
        """The row with the most tokens (of 500 steps spread over the plan, where it is long)."""
        some = range(0, self.steps, max(1, self.steps // 500))
        rows = [row for step in some for row in self.rows(self.start(step), self.end(step), limit)]
        return max(rows, key=lambda row: sum(self.examples.lengths[i] for i in row))

    def evaluation_steps(self, every: int) -> set[int]:
        """Before the first step, every `every` steps or (0) at the end of each epoch, and after the last step."""
        if every:
            return {0, *range(every, self.steps, every), self.steps}
        whole = range(
            len(self.examples), int(self.ends[-1]), len(self.examples)
        )  # cursors where an epoch ends
        return {0, *(int(np.searchsorted(self.ends, end)) + 1 for end in whole), self.steps}
