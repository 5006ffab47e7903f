"""Learning-rate schedules as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["cosine", "wsd", "constant"]


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    kind: ScheduleKind,
    warmup_steps: int,
    min_ratio: float,
    decay_fraction: float,
) -> float:
    """Rate of optimiser step `step` (0-based) of `steps`.

    Linear warm-up from peak / warmup_steps to the peak; then "cosine" to min_ratio * peak at the last step; "wsd"
    (warm-up, stable, decay; MiniCPM) constant, then linear to min_ratio * peak over the last decay_fraction of all
    steps; or "constant".
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    start = warmup_steps if kind == "cosine" else max(warmup_steps, steps - round(decay_fraction * steps))
    if step < start:
        return peak
    progress = (step - start) / max(steps - 1 - start, 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * shape)
