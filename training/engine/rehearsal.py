"""The rehearsal: the worst row, an evaluation row and a checkpoint, before a second of training is spent.

It finds a micro-batch that fits into memory (the effective batch stays), touches all memory the run will need, and
measures what the estimate is made of. Afterwards weights, optimizer and random numbers are exactly as before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from training.engine import checkpoint
from training.engine.device import Device, random_state, restore_random_state
from training.engine.distributed import Team
from training.engine.evaluate import batch_loss, evaluate
from training.engine.optimizer import AdamW
from training.engine.packing import Examples, split
from training.models.batch import Batch
from training.plan.config import Settings
from training.plan.events import Failure


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes; P50 and P90 of the whole run from here."""

    seconds_p50: float
    seconds_p90: float
    step_s: float
    evaluation_s: float
    checkpoint_s: float
    peak_memory: int
    micro_batch_tokens: int


def rehearse(
    model: Any,
    optimizer: AdamW,
    worst_row: Callable[[int], Batch],
    longest: int,
    held_out: Examples,
    settings: Settings,
    device: Device,
    *,
    tokens_to_train: int,
    steps: int,
    evaluations: int,
    snapshot: Callable[[], checkpoint.Snapshot],
    folder: Path,
    team: Team,
) -> tuple[Settings, Estimate]:
    """Settings with a micro-batch that fits, and the estimate. `worst_row(limit)` is the fullest row of the whole plan
    under such a micro-batch; `longest` is the longest document. Raises Failure("out_of_memory") if one document is too much."""
    before = random_state()
    limit = settings.micro_batch_tokens or 4096
    while True:
        try:
            row = worst_row(limit)
            seconds, update = _timed_step(model, optimizer, row, device)
            break
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if limit <= longest:
                raise Failure(
                    "out_of_memory", f"Not even one example of {longest} tokens fits into memory."
                ) from error
            limit = max(longest, limit // 2)
            model.zero_grad(set_to_none=True)
            if device.on_gpu:
                torch.cuda.empty_cache()
    evaluation = _evaluation_seconds(model, held_out, limit, device)
    written = _checkpoint_seconds(snapshot, folder) if team.leads else 0.0
    limit = team.least(limit)
    optimizer.reset()
    restore_random_state(before, device)
    training = seconds / len(row.ids) * tokens_to_train + update * steps
    rest = evaluation * evaluations + 2 * written
    estimate = Estimate(
        seconds_p50=training + rest,
        seconds_p90=1.3 * training + 1.6 * rest + 2,
        step_s=training / max(steps, 1),
        evaluation_s=evaluation,
        checkpoint_s=written,
        peak_memory=device.peak_memory(),
        micro_batch_tokens=limit,
    )
    return replace(settings, micro_batch_tokens=limit), estimate


def _timed_step(model: Any, optimizer: AdamW, row: Batch, device: Device) -> tuple[float, float]:
    """Seconds of a row, and of an update (at a learning rate of zero)."""
    batch = row.to(device.device)
    begun = time.perf_counter()
    for _ in range(
        2 if len(row.ids) < 2000 else 1
    ):  # the first run through small models mostly measures cold caches
        device.synchronize()
        begun = time.perf_counter()
        batch_loss(model, batch, 1.0)[0].backward()
        device.synchronize()
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    optimizer.zero_grad()
    optimizer.step(0.0, optimizer.grad_norm())  # moves nothing
    device.synchronize()
    return seconds, time.perf_counter() - begun


def _evaluation_seconds(model: Any, held_out: Examples, limit: int, device: Device) -> float:
    """One row of the held-out examples, scaled to all of them."""
    if not len(held_out):
        return 0.0
    row = split(held_out.lengths.tolist(), limit)[0]
    part = held_out.take(row)
    begun = time.perf_counter()
    evaluate(model, part, limit, device.device)
    return (time.perf_counter() - begun) * held_out.tokens / max(part.tokens, 1)


def _checkpoint_seconds(snapshot: Callable[[], checkpoint.Snapshot], folder: Path) -> float:
    """A real one, then removed: a full disk or a read-only folder shows now and not after an hour."""
    shutil.rmtree(
        folder / "rehearsal", ignore_errors=True
    )  # of an attempt that was killed in this very moment
    begun = time.perf_counter()
    path, _, _ = checkpoint.write(snapshot(), folder / "rehearsal")
    seconds = time.perf_counter() - begun
    shutil.rmtree(path.parent)
    return seconds


def out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words)
    )
