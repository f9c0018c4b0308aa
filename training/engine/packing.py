"""Examples, their order, and how they are packed into the rows a model reads.

A row is whole documents one after another: no padding, positions that restart, and attention that stays
inside each document (Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv
2107.02027).

The order of examples is a function of (seed, epoch), and progress is a single cursor that counts examples over
all epochs. So two numbers, the seed and the cursor, are enough to continue exactly where a crash interrupted a
run. The order never depends on the micro-batch, on the number of processes, or on random numbers that were
drawn before.
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
    """All examples in one array: `ids[starts[i]:starts[i + 1]]` is example i. Five bytes per token, where
    a Python list takes over forty."""

    ids: np.ndarray  # (tokens,) int32
    mask: np.ndarray  # (tokens,) uint8: 1 where the token is trained on
    starts: np.ndarray  # (examples + 1,) int64

    @staticmethod
    def of(encoded: Iterable[Encoded]) -> Examples:
        """Concatenates encoded examples, in their order."""
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
        """(examples,) int64: tokens of each example."""
        return np.diff(self.starts)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (t,), mask (t,)) of example i: views, not copies."""
        part = slice(self.starts[i], self.starts[i + 1])
        return self.ids[part], self.mask[part]

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def trained_tokens(self) -> int:
        return int(self.trained().sum())

    def trained(self) -> np.ndarray:
        """(examples,) int64: tokens of each example that are trained on. The first token never is: nothing
        predicts it."""
        # Prefix sums: the trained tokens of example i are before[end] - before[start].
        before = np.concatenate([[0], np.cumsum(self.mask, dtype=np.int64)])
        whole: np.ndarray = before[self.starts[1:]] - before[self.starts[:-1]]
        first = np.where(
            self.lengths > 0, self.mask[np.minimum(self.starts[:-1], max(len(self.mask) - 1, 0))], 0
        )
        if len(self):
            whole -= first
        return whole

    def take(self, which: Sequence[int] | np.ndarray) -> Examples:
        """The examples with these indices, in this order, copied."""
        parts = [self[int(i)] for i in which]
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in parts])]).astype(np.int64)
        empty = np.zeros(0, np.int32)
        return Examples(
            np.concatenate([ids for ids, _ in parts] or [empty]),
            np.concatenate([mask for _, mask in parts] or [empty.astype(np.uint8)]),
            starts,
        )

    def hash(self) -> str:
        """sha256 of all tokens and masks: a checkpoint belongs to the data it was made with."""
        digest = hashlib.sha256()
        for part in (self.ids, self.mask, self.starts):
            digest.update(part.tobytes())
        return digest.hexdigest()


def hold_out(
    examples: Examples, fraction: float, seed: int, row_of: Sequence[int] | None = None
) -> tuple[Examples, Examples]:
    """Splits into (training, held-out) examples, about `fraction` of them held out. `row_of`: the row that
    each example comes from; the examples of a conversation repeat its text, so they stay together.

    An example's side is decided by a hash of its row's first tokens and the seed, not by its position:
    duplicates are always on the same side, and adding or reordering rows moves few of the others."""
    row_of = range(len(examples)) if row_of is None else row_of
    first = {row: i for i, row in reversed(list(enumerate(row_of)))}
    wanted = round(len(first) * fraction)
    if wanted == 0 or len(first) < 2:
        return examples, examples.take([])
    keys = {
        row: hashlib.sha256(f"{seed}:".encode() + examples[i][0].tobytes()).digest()
        for row, i in first.items()
    }
    threshold = sorted(keys.values())[wanted - 1]
    # The rows with the smallest hashes. Ties are duplicates, so all of them are held out.
    held = np.array([keys[row] <= threshold for row in row_of])
    if held.all():  # all examples are the same
        return examples, examples.take([])
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


# ---- order -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the examples in one epoch, (count,) int64: a permutation of its own for each epoch.

    It has its own generator, seeded by a hash, so it does not depend on random numbers drawn elsewhere.
    The key is part of the checkpoint format: changing it would break resuming."""
    key = hashlib.sha256(f"order:1:{seed}:{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "big"))).permutation(count)


def example_at(cursor: int, seed: int, count: int) -> int:
    """Index of the example at `cursor` in the endless stream of shuffled epochs."""
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
    """The cursor after each optimizer step, (steps,) int64.

    A step may span the end of an epoch; the last one takes what is left. Fractions of epochs are allowed."""
    count = len(lengths)
    total = max(1, round(epochs * count)) if epochs is not None else None
    if batch_tokens is None:
        # by examples: steps of equal size
        size = batch_size or 1
        steps = max_steps if max_steps is not None else -(-(total or 0) // size)
        ends = np.arange(1, steps + 1, dtype=np.int64) * size
        return np.minimum(ends, total) if max_steps is None and total is not None else ends
    # by tokens: fill each step greedily up to batch_tokens; an example longer than that is a step of its own
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


# ---- rows --------------------------------------------------------------------------------------------------


def split(lengths: Sequence[int], limit: int, parts: int = 1) -> list[list[int]]:
    """Distributes documents over rows of at most `limit` tokens, as evenly as it can; returns indices into
    `lengths`.

    A document longer than `limit` gets a row of its own. The number of rows is a multiple of `parts` (the
    number of processes) if there are enough documents, so that no process waits without a row.

    Longest processing time first (Graham, 1969): sort by length, put each document into the emptiest row.
    Even rows matter more than few rows, since the fullest row decides the memory and, with several
    processes, the time."""
    # the fewest rows that could hold all tokens, rounded up to a multiple of `parts`; more if that does not
    # work out
    wanted = max(1, -(-sum(lengths) // limit))
    wanted = -(-wanted // parts) * parts
    while True:
        rows: list[list[int]] = [[] for _ in range(min(wanted, len(lengths)))]
        filled = [0] * len(rows)
        # longest first, each into the emptiest row
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            row = filled.index(min(filled))
            rows[row].append(i)
            filled[row] += lengths[i]
        too_full = any(total > limit and len(row) > 1 for total, row in zip(filled, rows, strict=True))
        if not too_full or wanted >= len(lengths):
            return [sorted(row) for row in rows]
        wanted += parts


# ---- both together -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step takes, and how they are packed into rows."""

    examples: Examples
    ends: np.ndarray  # (steps,) int64: the cursor after each step
    seed: int
    processes: int = 1  # rows per step are a multiple of it if there are enough examples

    @staticmethod
    def of(examples: Examples, settings: Settings, processes: int = 1) -> StepPlan:
        """The plan for resolved settings (batch size or tokens, epochs or steps, seed)."""
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
        """Tokens of all steps: exact for whole epochs, estimated by the mean for the rest."""
        lengths = self.examples.lengths
        epochs, rest = divmod(int(self.ends[-1]), len(lengths))
        return int(lengths.sum() * epochs + lengths.mean() * rest)

    def end(self, step: int) -> int:
        """The cursor after optimizer step `step` (0 ≤ step < steps)."""
        return int(self.ends[step])

    def start(self, step: int) -> int:
        """The cursor before optimizer step `step`."""
        return self.end(step - 1) if step else 0

    def rows(self, begin: int, end: int, limit: int) -> list[list[int]]:
        """The examples from cursor `begin` to cursor `end`, packed into rows of at most `limit` tokens.

        Returns rows of indices of examples. The same arguments always give the same rows."""
        which = [example_at(at, self.seed, len(self.examples)) for at in range(begin, end)]
        rows = split([int(self.examples.lengths[i]) for i in which], limit, self.processes)
        return [[which[i] for i in row] for row in rows]

    def fullest_row(self, limit: int) -> list[int]:
        """The row with the most tokens, of all steps or, in a long plan, of about 500 evenly spaced ones."""
        some = range(0, self.steps, max(1, self.steps // 500))
        rows = [row for step in some for row in self.rows(self.start(step), self.end(step), limit)]
        return max(rows, key=lambda row: sum(self.examples.lengths[i] for i in row))

    def evaluation_steps(self, every: int) -> set[int]:
        """Steps at which to evaluate: before the first, every `every` steps (0: at the end of each epoch),
        and after the last."""
        if every:
            return {0, *range(every, self.steps, every), self.steps}
        # cursors where an epoch ends
        whole = range(len(self.examples), int(self.ends[-1]), len(self.examples))
        return {0, *(int(np.searchsorted(self.ends, end)) + 1 for end in whole), self.steps}
