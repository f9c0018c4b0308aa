"""The learning rate as a pure function of the step, so it needs no state in a checkpoint."""

from __future__ import annotations

import math

WSD_DECAY = 0.2  # fraction of the steps over which "wsd" decays at the end


def warmup_steps(warmup: float, total: int) -> int:
    """Number of warmup steps: `warmup` below 1 is a fraction of all steps, otherwise a number of steps."""
    return min(total - 1, round(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate of optimizer step `step` (0 ≤ step < total): linear warmup (Goyal et al., arXiv
    1706.02677), then `schedule`."""
    rising = warmup_steps(warmup, total)
    if step < rising:
        # never zero, not even in the first step
        return peak * (step + 1) / (rising + 1)
    if schedule == "constant":
        return peak
    progress = (step - rising) / (total - rising)  # 0 ≤ progress < 1
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        # half a cosine (SGDR, arXiv 1608.03983), to zero
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    # warmup-stable-decay (MiniCPM, arXiv 2404.06395): constant, then linearly to zero
    assert schedule == "wsd"
    return peak * min(1.0, (1 - progress) / WSD_DECAY)
