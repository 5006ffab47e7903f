"""Making long series drawable: thinning and smoothing. NaN stands for a missing value throughout."""

from __future__ import annotations

import numpy as np

from moeforge.report.runs import Array

MAX_POINTS = 2000
"""Longest line of a chart with a few lines."""
MAX_LAYER_POINTS = 400
"""Longest line of a chart with one line per layer: there may be a hundred of them."""


def finite(x: Array, y: Array) -> tuple[Array, Array]:
    """The points of a sparse series (recorded every N steps): those with both coordinates finite."""
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def thin(x: Array, y: Array, limit: int = MAX_POINTS) -> tuple[Array, Array]:
    """At most `limit` points: the first and last, and the lowest and highest of each bucket between, so that
    spikes survive. Both finite, [n] -> both [min(n, limit)] or a little less."""
    n = len(x)
    if n <= limit:
        return x, y
    edges = np.linspace(1, n - 1, max(limit // 2, 1), dtype=int)
    keep = {0, n - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        keep |= {int(start + y[start:stop].argmin()), int(start + y[start:stop].argmax())}
    order = sorted(keep)
    return x[order], y[order]


def smoothing_steps(count: int) -> int:
    """The time constant, in steps, that suits a series of `count` points: a fiftieth of it, 1 to 200."""
    return int(np.clip(count // 50, 1, 200))


def smooth(y: Array, steps: int) -> Array:
    """Exponential moving average along the first axis, without start-up bias: [n] or [n, L] -> same shape.

    `steps` is its time constant. NaN is left as it is and does not enter the average.
    """
    keep = 1 - 1 / max(steps, 1)
    if keep == 0:
        return y
    total, weight = np.zeros(y.shape[1:]), np.zeros(y.shape[1:])
    known, result = np.isfinite(y), np.full(y.shape, np.nan)
    for i, (value, new) in enumerate(zip(y, known, strict=True)):
        total = np.where(new, keep * total + value, total)
        weight = np.where(new, keep * weight + 1, weight)
        result[i] = total / np.maximum(weight, 1)
    return np.where(known, result, np.nan)


def mean_over_layers(values: Array) -> Array:
    """[R, L] -> [R], ignoring NaN; NaN where no layer has a value."""
    known = np.isfinite(values)
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
