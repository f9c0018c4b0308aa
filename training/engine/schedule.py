"""The learning rate as a pure function of the step: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

WSD_DECAY = 0.2  # share of the steps over which "wsd" comes down at the end


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below 1 is a share of the steps, else a number of them."""
    return min(total - 1, round(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of optimizer step `step` (0 ≤ step < total). It rises in a line, then falls as `schedule` says."""
    rising = warmup_steps(warmup, total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    if schedule == "constant":
        return peak
    progress = (step - rising) / (total - rising)  # 0 ≤ progress < 1
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    assert schedule == "wsd"
    return peak * min(1.0, (1 - progress) / WSD_DECAY)
