"""The rehearsal: tries the longest row, an evaluation and a checkpoint before training starts.

It finds a micro-batch that fits in memory (the effective batch size stays the same), touches all the memory
the run will need, and measures what the estimate is based on. Afterwards weights, optimizer and random state
are exactly as before.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from training.engine import checkpoint
from training.engine.device import out_of_memory, random_state, restore_random_state
from training.engine.optimizer import AdamW
from training.engine.packing import split
from training.engine.saver import Saver, State
from training.engine.setup import Session
from training.models.batch import Batch, pack
from training.plan.config import Settings
from training.plan.events import Failure


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes: P50 and P90 of the rest of the run, and what they are made of."""

    seconds_p50: float
    seconds_p90: float
    step_s: float
    evaluation_s: float
    checkpoint_s: float
    peak_memory: int
    micro_batch_tokens: int


def rehearse(session: Session, saver: Saver) -> tuple[Settings, Estimate]:
    """Returns settings with a micro-batch that fits in memory, and the estimate.

    Raises Failure("out_of_memory") if not even one document fits."""
    device, optimizer, plan = session.device, session.optimizer, session.plan
    assert isinstance(optimizer, AdamW)  # sharded models are not rehearsed
    before = random_state()
    limit, row, seconds, update = _largest_that_fits(session, optimizer)
    evaluation = _evaluation_seconds(session, limit)
    written = _checkpoint_seconds(saver, Path(session.run.work_dir)) if session.processes.is_main else 0.0
    # all processes must cut the same rows
    limit = session.processes.minimum(limit)
    # undo everything: gradients, moments, step count and random state
    optimizer.reset()
    restore_random_state(before, device)
    # time is proportional to tokens; updates and the rest are counted separately
    training = seconds / len(row.ids) * plan.tokens + update * plan.steps
    rest = evaluation * len(session.evaluation_steps) + 2 * written
    estimate = Estimate(
        seconds_p50=training + rest,
        # fixed safety margins
        seconds_p90=1.3 * training + 1.6 * rest + 2,
        step_s=training / max(plan.steps, 1),
        evaluation_s=evaluation,
        checkpoint_s=written,
        peak_memory=device.peak_memory(),
        micro_batch_tokens=limit,
    )
    return replace(session.settings, micro_batch_tokens=limit), estimate


def _largest_that_fits(session: Session, optimizer: AdamW) -> tuple[int, Batch, float, float]:
    """Halves the micro-batch until the plan's fullest row fits in memory.

    Returns (micro-batch tokens, that row, seconds of its forward and backward pass, seconds of an update)."""
    data, longest = session.data.train, int(session.data.train.lengths.max())
    limit = session.settings.micro_batch_tokens or 4096
    while True:
        try:
            row = pack([data[i] for i in session.plan.fullest_row(limit)])
            return limit, row, *_timed_step(session, optimizer, row)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if limit <= longest:
                raise Failure(
                    "out_of_memory", f"Not even one example of {longest} tokens fits in memory."
                ) from error
            limit = max(longest, limit // 2)
            session.model.zero_grad(set_to_none=True)
            if session.device.on_gpu:
                torch.cuda.empty_cache()


def _timed_step(session: Session, optimizer: AdamW, row: Batch) -> tuple[float, float]:
    """Seconds of a row's forward and backward pass, and of an update with learning rate zero."""
    device = session.device
    batch = row.to(device.device)
    begun = time.perf_counter()
    # with small models the first pass mostly measures cold caches
    for _ in range(2 if len(row.ids) < 2000 else 1):
        device.synchronize()
        begun = time.perf_counter()
        session.data.objective.loss(session.model, batch, 1.0)[0].backward()
        device.synchronize()
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    optimizer.zero_grad()
    optimizer.step(0.0, optimizer.grad_norm())  # changes no weight
    device.synchronize()
    return seconds, time.perf_counter() - begun


def _evaluation_seconds(session: Session, limit: int) -> float:
    """Seconds of an evaluation: one row of the held-out examples, scaled to all of them."""
    held_out = session.data.held_out
    if not len(held_out):
        return 0.0
    row = split(held_out.lengths.tolist(), limit)[0]
    part = held_out.take(row)
    begun = time.perf_counter()
    session.data.objective.evaluate(session.model, part, limit, session.device.device)
    return (time.perf_counter() - begun) * held_out.tokens / max(part.tokens, 1)


def _checkpoint_seconds(saver: Saver, folder: Path) -> float:
    """Writes a real checkpoint and removes it, so that a full disk or a read-only folder is detected now and not
    after an hour of training."""
    # left by an attempt that was killed here
    shutil.rmtree(folder / "rehearsal", ignore_errors=True)
    begun = time.perf_counter()
    path, _, _ = checkpoint.write(saver.snapshot(State()), folder / "rehearsal")
    seconds = time.perf_counter() - begun
    shutil.rmtree(path.parent)
    return seconds
