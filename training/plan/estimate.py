"""Estimates a run before it starts, from the work that it consists of and the typical speed of such a machine,
corrected by how long each part took in finished jobs.

The form can show this estimate at once. Later, the rehearsal on the worker measures everything and is more accurate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from training.data.summary import Summary
from training.plan.catalog import BaseModel, Machine, activation_memory, gib, lora_parameters
from training.plan.config import Settings

# Typical speeds, if nothing was measured: of a CPU core and of a GPU, in operations per second
CPU_CORE, GPU = 45e9, 60e12
SHARE = 0.85  # fraction of the rate of a plain matrix product that training reaches
# speed relative to fp32 on CPUs with bf16 units: for GPT-2, for the starter
BF16_WIDE, BF16_NARROW = (
    1.45,
    0.6,
)
OVERHEAD = 2.5e-4  # seconds per layer and row, whatever its size: most of the time of small models
MEMORY_BYTES = 8e9  # per second, through the optimizer or a decoder
DISK_BYTES = 4e8  # per second: written, hashed, copied
PROMPTS, ANSWER = 3, 32  # samples at each evaluation, and their tokens
HOLES = 1.35  # memory of a row's activations, including fragmentation by rows of other lengths
FEW = 3  # with fewer finished jobs, nothing is corrected
UNSURE = 1.5  # P90 / P50 until then
FADES = 0.98  # weight of each job relative to the next newer one
USUAL_NOISE = 0.1  # jobs with a larger error get less weight
PULL = 0.02  # ridge penalty: how strongly the speed of a part is pulled to the overall speed

# part (start, training, evaluation, export) → what it consists of → seconds
Work = dict[str, dict[str, float]]


@dataclass(frozen=True)
class FinishedJob:
    """What a finished job consisted of, the seconds of each part, and its peak memory."""

    work: Work
    took: dict[str, float]
    memory: dict[str, float]
    peak: float
    base: str
    adapter: str


@dataclass(frozen=True)
class Estimate:
    """Times in seconds: half of all jobs take less than P50, nine in ten less than P90. `rows` and `basis`
    are for a page."""

    seconds_p50: float
    seconds_p90: float
    steps: int
    tokens: int  # read in training, over all epochs
    memory: int
    parts: dict[str, float]  # seconds of each part
    cost_p50: float
    cost_p90: float
    rows: list[tuple[str, str]]
    basis: str
    work: Work
    memory_parts: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    base: BaseModel,
    settings: Settings,
    summary: Summary,
    machine: Machine,
    *,
    validation: Summary | None = None,
    past: Sequence[FinishedJob] = (),
    queue: float = 0.0,
    price_per_hour: float = 0.0,
) -> Estimate:
    """The estimate for resolved settings (see auto_settings.resolve). `queue`: seconds until a worker is
    free, at no cost."""
    plan = _Plan.of(base, settings, summary, validation)
    work, kept = plan.work(machine), plan.memory()
    alike = [p for p in past if p.took][:50]
    seconds, spread = _time(work, alike, base.id, settings.adapter)
    memory = _memory(kept, alike, base.id, settings.adapter)
    parts = {part: sum(of.values()) for part, of in seconds.items()}
    total = sum(parts.values())
    low, high = queue + total, (queue + total) * spread
    cost = price_per_hour / 3600
    # shown as a part of its own; written while training continues
    saving = seconds["training"]["checkpoints"]
    shown = {"queue": queue} | parts | {"training": parts["training"] - saving, "checkpoints": saving}
    return Estimate(
        low,
        high,
        plan.steps,
        plan.tokens,
        memory,
        shown,
        total * cost,
        total * spread * cost,
        _rows(plan, shown, memory, machine, (total * cost, total * spread * cost)),
        _basis(alike, machine),
        work,
        kept,
    )


def speed(machine: Machine) -> float:
    """Operations per second that training is expected to reach."""
    if machine.rate:
        return SHARE * machine.rate * machine.count
    return GPU * machine.count if machine.device == "cuda" else CPU_CORE * max(1, machine.cores)


def bf16_speedup(base: BaseModel, settings: Settings, machine: Machine) -> float:
    """How much faster than fp32 a CPU is with bf16, if the settings ask for it or the measurement before
    training will choose it; otherwise 1."""
    if machine.device != "cpu" or settings.precision == "fp32" or not machine.bf16:
        return 1.0
    if base.width >= 512:
        return BF16_WIDE
    return 1.0 if settings.precision == "auto" else BF16_NARROW


# --- what a run consists of -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    base: BaseModel
    settings: Settings
    summary: Summary
    steps: int
    tokens: int
    examples: int  # trained on
    held: int  # tokens of the examples held out
    evaluations: int
    batch: int  # tokens of the largest step
    row: int  # tokens of its fullest row

    @classmethod
    def of(cls, base: BaseModel, settings: Settings, summary: Summary, validation: Summary | None) -> _Plan:
        share = 0.0 if validation else settings.validation_fraction or 0.0
        examples = max(1, round(summary.examples * (1 - share)))
        mean = summary.tokens / max(1, summary.examples)
        steps, seen = _steps(settings, examples, mean)
        held = validation.tokens if validation else round(summary.tokens * share)
        rounds = steps // settings.eval_every if settings.eval_every else math.ceil(seen / examples - 1e-9)
        batch = _largest(summary, max(1, round(seen / steps)), steps)
        row = min(batch, max(settings.micro_batch_tokens or 4096, min(summary.longest, batch)))
        return cls(
            base,
            settings,
            summary,
            steps,
            round(seen * mean),
            examples,
            held,
            1 + rounds if held else 0,
            batch,
            row,
        )

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        full = self.settings.adapter == "none"
        return self.base.parameters if full else lora_parameters(self.base, self.settings.lora_rank)

    def work(self, machine: Machine) -> Work:
        base, s = self.base, self.settings
        mean = self.summary.tokens / max(1, self.summary.examples)
        share = self.summary.trained_tokens / max(1, self.summary.tokens)
        each = operations(base, s, mean, share) / (speed(machine) * bf16_speedup(base, s, machine))
        pass_s = base.layers * OVERHEAD
        micro = s.micro_batch_tokens or 4096
        rows = self.steps * max(1.0, self.tokens / self.steps / micro)
        update = 28 * self.trained / MEMORY_BYTES + 2e-3  # weight, gradient and two moments, read and written
        saved = 12 * self.trained / DISK_BYTES + 0.02
        answers = PROMPTS * ANSWER * (pass_s / 2 + 4 * base.parameters / MEMORY_BYTES)
        by_steps = self.steps // s.checkpoint_every_steps if s.checkpoint_every_steps else 0
        run = self.tokens * each + rows * pass_s
        by_time = int(run / s.checkpoint_every_s) if s.checkpoint_every_s else 0
        best = self.evaluations - 1 if self.held and s.keep_best else 1
        rehearsed = min(self.held, micro) * each / 3 + self.row * each * (2 if self.row < 2000 else 1)
        return {
            "start": {
                "fixed": 2.0,
                "reading": self.summary.tokens * 3e-6,
                "weights": (4 * base.parameters + 12 * self.trained) / 2e9,
                "rehearsal": rehearsed + update + saved + 3 * pass_s,
            },
            "training": {
                "arithmetic": self.tokens * each,
                "rows": rows * pass_s,
                "updates": self.steps * update,
                "checkpoints": max(1, by_steps + by_time + best) * saved,
            },
            "evaluation": {
                "arithmetic": self.evaluations * self.held * each / 3,
                "rows": self.evaluations * max(1.0, self.held / micro) * pass_s / 3 if self.held else 0.0,
                "samples": self.evaluations * answers,
            },
            "export": {"fixed": 1.0, "bytes": 3 * 4 * base.parameters / DISK_BYTES},
        }

    def memory(self) -> dict[str, float]:
        """Bytes at the peak: the process, the weights, what training adds to them, and the larger of a
        row's backward pass and the copy from which a checkpoint is written."""
        row = HOLES * activation_memory(self.base, self.row, self.settings.gradient_checkpointing)
        row *= 1 if self.settings.adapter == "none" else 0.75  # with frozen weights, fewer inputs are kept
        return {
            "process": 270e6,
            "weights": 4.0 * self.base.parameters,
            "training": 12.0 * self.trained,
            "row": max(row, 12.0 * self.trained),
        }


def _steps(settings: Settings, examples: int, mean: float) -> tuple[int, int]:
    """(optimizer steps, examples seen)."""
    batch = settings.batch_size or max(1, round((settings.batch_tokens or 4096) / mean))
    if settings.max_steps is not None:
        return settings.max_steps, settings.max_steps * batch
    seen = max(1, round(examples * (settings.epochs or 1.0)))
    return math.ceil(seen / batch), seen


def _largest(summary: Summary, batch: int, steps: int) -> int:
    """Expected tokens of the largest of `steps` random batches, from mean and variance of the lengths in
    the histogram."""
    mean = summary.tokens / max(1, summary.examples)
    # An example in the bucket up to 2ⁿ has about three quarters of that; the first bucket has all up to 16.
    squares = sum(n * (12 << i) ** 2 for i, n in enumerate(summary.histogram))
    spread = math.sqrt(max(0.0, squares / max(1, summary.examples) - mean**2))
    high = batch * mean + math.sqrt(2 * math.log(max(2, steps)) * batch) * spread
    return max(1, round(min(high, batch * max(summary.longest, mean))))


def operations(base: BaseModel, settings: Settings, mean: float, trained_share: float) -> float:
    """Operations per token, forward and backward. The head is computed for trained tokens only; LoRA needs
    no weight gradients."""
    body = base.parameters - (base.vocab + base.context) * base.width
    attention = base.layers * base.width * mean * 2
    head = base.vocab * base.width * trained_share
    passes = 6 if settings.adapter == "none" else 4
    return passes * (body + attention + head) * (4 / 3 if settings.gradient_checkpointing else 1)


# --- learning from finished jobs ------------------------------------------------------------------


def _time(work: Work, past: Sequence[FinishedJob], base: str, adapter: str) -> tuple[Work, float]:
    """(corrected seconds of the work, P90 / P50)."""
    if len(past) < FEW:
        return work, UNSURE
    totals = [sum(p.took.values()) for p in past]
    alike = [_likeness(p, base, adapter) for p in past]
    weights = [like * FADES**age for age, like in enumerate(alike)]
    for _ in range(3):  # reweighted: jobs that were disturbed count less each time
        fitted, ratios = _fitted(work, past, totals, weights)
        off = [abs(math.log(max(ratio, 1e-6))) for ratio in ratios]
        weights = [w * min(1.0, USUAL_NOISE / max(o, 1e-9)) for w, o in zip(weights, off, strict=True)]
    usual = _typical([(r, w) for r, w, like in zip(ratios, weights, alike, strict=True) if like == 1])
    fitted = {part: {name: usual * seconds for name, seconds in of.items()} for part, of in fitted.items()}
    return fitted, _spread(
        [(r / (usual if like == 1 else 1), like) for r, like in zip(ratios, alike, strict=True)]
    )


def _fitted(
    work: Work, past: Sequence[FinishedJob], totals: list[float], weights: list[float]
) -> tuple[Work, list[float]]:
    """(seconds of the work according to finished jobs, actual / fitted time of each of those)."""
    fitted: Work = {}
    again = np.zeros(len(past))
    for part, of in work.items():
        rows = [p.work.get(part, {}) for p in past]
        factors = _fit(list(of), rows, [p.took.get(part, 0.0) for p in past], totals, weights)
        fitted[part] = {name: factors[name] * seconds for name, seconds in of.items()}
        again += [sum(factors[name] * row.get(name, 0.0) for name in of) for row in rows]
    return fitted, (np.array(totals) / np.maximum(again, 1e-9)).tolist()


def _memory(kept: dict[str, float], past: Sequence[FinishedJob], base: str, adapter: str) -> int:
    known = [p for p in past if p.peak and p.memory]
    if len(known) < FEW:
        return int(sum(kept.values()))
    weights = [_likeness(p, base, adapter) for p in known]
    peaks = [p.peak for p in known]
    factors = _fit(list(kept), [p.memory for p in known], peaks, peaks, weights)
    return int(sum(factors[name] * size for name, size in kept.items()))


def _likeness(past: FinishedJob, base: str, adapter: str) -> float:
    """How much a finished job says about another one: most with the same model and adapter."""
    return 1.0 if (past.base, past.adapter) == (base, adapter) else 0.2 if past.base == base else 0.05


def _fit(
    names: list[str],
    rows: Sequence[dict[str, float]],
    took: list[float],
    scale: list[float],
    weights: list[float],
) -> dict[str, float]:
    """A factor for each of `names`: weighted ridge regression of what each job took, relative to `scale`.
    What the jobs do not determine stays at the median factor. No factor is less than a tenth of that."""
    expected = [sum(row.get(name, 0.0) for name in names) for row in rows]
    ratios = [(t / e, w) for t, e, w in zip(took, expected, weights, strict=True) if e > 0]
    middle = max(_quantile(ratios, 0.5), 1e-3) if ratios else 1.0
    matrix = np.array([[row.get(name, 0.0) * middle for name in names] for row in rows])
    largest = np.maximum(np.array(scale), matrix.sum(1))  # underestimates count as much as overestimates
    matrix, target = matrix / largest[:, None], np.array(took) / largest
    heavy = np.array(weights)[:, None]
    left = (matrix * heavy).T @ matrix + PULL * np.eye(len(names)) * max(weights) / len(names)
    right = (matrix * heavy).T @ (target - matrix.sum(1))
    change = np.zeros(len(names))
    for _ in range(100):  # coordinate descent, because of the lower bound
        for i in range(len(names)):
            change[i] = max(-0.9, change[i] + (right[i] - left[i] @ change) / left[i, i])
    return {name: middle * (1 + float(c)) for name, c in zip(names, change, strict=True)}


def _typical(ratios: list[tuple[float, float]]) -> float:
    """The factor that remains for jobs with the same model and adapter, because operation counts do not explain
    everything."""
    return _quantile(ratios, 0.5) if len(ratios) >= FEW else 1.0


def _spread(ratios: list[tuple[float, float]]) -> float:
    """P90 / P50 from the (ratio, weight) of finished jobs to their fitted times, half as much again
    because the fit was made from these jobs, between 1.12 and 1.35."""
    return min(max(1 + 1.5 * (_quantile(ratios, 0.9) - 1), 1.12), 1.35)


def _quantile(ratios: list[tuple[float, float]], share: float) -> float:
    """Weighted quantile of (value, weight): the smallest value with that share of the weight at or below
    it."""
    wanted, seen = share * sum(weight for _, weight in ratios) - 1e-9, 0.0
    ordered = sorted(ratios)
    for value, weight in ordered:
        seen += weight
        if seen >= wanted:
            return value
    return ordered[-1][0]


# --- for a page -----------------------------------------------------------------------------------


def _rows(
    plan: _Plan, parts: dict[str, float], memory: int, machine: Machine, cost: tuple[float, float]
) -> list[tuple[str, str]]:
    share = plan.summary.trained_tokens / max(1, plan.summary.tokens)
    table = [
        ("Steps", f"{plan.steps:,}"),
        ("Tokens read", f"{plan.tokens:,}"),
        ("Trained tokens", f"{round(plan.tokens * share):,}"),
        *((word, format_duration(parts[part])) for part, word in PART_LABELS.items() if parts[part] >= 0.5),
        ("Peak memory", f"{gib(memory)} of {gib(machine.memory)}"),
    ]
    if cost[0]:
        table.append(("Cost", f"{cost[0]:.2f}–{cost[1]:.2f}"))
    return table


PART_LABELS = {
    "queue": "Waiting for a worker",
    "start": "Startup",
    "training": "Training",
    "checkpoints": "Checkpoints",
    "evaluation": "Evaluation",
    "export": "Export",
}


def format_duration(seconds: float) -> str:
    """Seconds as text, no more precise than the estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _basis(past: Sequence[FinishedJob], machine: Machine) -> str:
    if len(past) < FEW:
        how = "measured" if machine.rate else "typical"
        return f"Based on the exact token counts of the data and the {how} speed of {machine.name}. It improves as jobs finish."
    return f"Based on the exact token counts of the data and the last {len(past)} jobs on a machine of this kind."
