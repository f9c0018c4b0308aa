"""What a run will take, before it starts: from exact token counts, the model's arithmetic and measured speed.

The rehearsal on the worker measures all this again and knows better; this is what the form can say within a moment.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from training.catalog import BaseModel, Machine, training_memory
from training.config import Settings
from training.report import Summary

# Floating-point operations a second that training reaches, where nothing was measured yet.
CPU_CORE, GPU = 45e9, 60e12
OVERHEAD = 2.5e-4  # seconds a layer and row, whatever its size: what small models mostly wait for
START = 4.0  # loading torch and the model (a warm trainer takes less)


@dataclass(frozen=True)
class Past:
    """A finished job: what was predicted and what it took, in seconds."""

    predicted: float
    actual: float


@dataclass(frozen=True)
class Estimate:
    """Seconds; half the time under P50, nine times in ten under P90. `rows` and `basis` are for a page."""

    seconds_p50: float
    seconds_p90: float
    steps: int
    tokens: int  # read in training, all epochs together
    memory: int
    parts: dict[str, float]  # seconds of each part
    cost_p50: float
    cost_p90: float
    rows: list[tuple[str, str]]
    basis: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    base: BaseModel,
    settings: Settings,
    summary: Summary,
    machine: Machine,
    *,
    past: list[Past] | None = None,
    price_per_hour: float = 0.0,
) -> Estimate:
    """For settings without open fields (see auto.resolve)."""
    held = settings.validation_fraction or 0.0
    examples = max(1, round(summary.examples * (1 - held)))
    mean = summary.tokens / max(1, summary.examples)
    steps, seen = _steps(settings, examples, mean)
    tokens = round(seen * mean)
    trained_share = summary.trained_tokens / max(1, summary.tokens)

    each = _operations(base, settings, mean, trained_share) / speed(machine)
    micro = max(1.0, settings.micro_batch_tokens or 4096)
    rows = max(steps, math.ceil(tokens / micro))
    evaluations = 2 + (steps // settings.eval_every if settings.eval_every else math.ceil(seen / examples))
    size = 4 * base.parameters * (3 if settings.method == "full" else 1)
    parts = {
        "start": START + size / 2e9,
        "training": tokens * each + (rows + steps) * base.layers * OVERHEAD,
        "evaluation": evaluations * summary.examples * held * mean * each / 3 if held else 0.0,
        "checkpoints": 2 * size / 3e8 + 0.1,
        "export": 1.0 + size / 3e8,
    }
    total = sum(parts.values())
    ratio, spread, basis = _experience(past or [], machine)
    p50, p90 = total * ratio, total * ratio * spread
    memory = training_memory(
        base,
        settings.method,
        int(min(micro, max(mean, tokens / max(steps, 1)))),
        settings.gradient_checkpointing,
    )
    cost = price_per_hour / 3600
    table = [
        ("Steps", f"{steps:,}"),
        ("Tokens read", f"{tokens:,}"),
        ("Trained tokens", f"{round(tokens * trained_share):,}"),
        ("Peak memory", f"{memory / 1e9:.1f} GB of {machine.memory / 1e9:.0f} GB"),
    ]
    if price_per_hour:
        table.append(("Cost", f"{p50 * cost:.2f}–{p90 * cost:.2f}"))
    return Estimate(p50, p90, steps, tokens, memory, parts, p50 * cost, p90 * cost, table, basis)


def speed(machine: Machine) -> float:
    """Operations a second that training is expected to reach."""
    return GPU * machine.count if machine.device == "cuda" else CPU_CORE * max(1, machine.cores)


def _steps(settings: Settings, examples: int, mean: float) -> tuple[int, int]:
    """(optimizer steps, examples seen)."""
    batch = settings.batch_size or max(1, round((settings.batch_tokens or 4096) / mean))
    if settings.max_steps is not None:
        return settings.max_steps, settings.max_steps * batch
    seen = max(1, round(examples * (settings.epochs or 1.0)))
    return math.ceil(seen / batch), seen


def _operations(base: BaseModel, settings: Settings, mean: float, trained_share: float) -> float:
    """A token, forward and backward. The head is computed for trained tokens only; LoRA spares the weights' gradients."""
    body = base.parameters - (base.vocab + base.context) * base.width
    attention = base.layers * base.width * mean * 2
    head = base.vocab * base.width * trained_share
    passes = 6 if settings.method == "full" else 4
    return passes * (body + attention + head) * (4 / 3 if settings.gradient_checkpointing else 1)


def _experience(past: list[Past], machine: Machine) -> tuple[float, float, str]:
    """(how much longer jobs took than predicted, P90 over P50, the sentence that says so)."""
    ratios = sorted(p.actual / p.predicted for p in past if p.predicted > 0 and p.actual > 0)[-50:]
    if len(ratios) < 3:
        return (
            1.0,
            1.5,
            f"From the data's exact tokens and the usual speed of {machine.name}; it learns from your jobs.",
        )
    middle = median(ratios)
    high = ratios[min(len(ratios) - 1, math.ceil(0.9 * len(ratios)) - 1)]
    return (
        middle,
        min(max(high / middle, 1.15), 2.0),
        f"From the data's exact tokens and the last {len(ratios)} jobs here.",
    )
