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
    """At most `limit` points: the first and last ones, and the lowest and highest of each bucket between, so that
    spikes survive. Both [n] -> both [min(n, limit)] or a little less."""
    n = len(x)
    if n <= limit:
        return x, y
    edges = np.linspace(1, n - 1, max(limit // 2, 1), dtype=int)
    keep = {0, n - 1}
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        bucket = y[start:stop]
        if np.isnan(bucket).all():
            keep.add(int(start))  # the gap stays visible
        else:
            keep |= {int(start + np.nanargmin(bucket)), int(start + np.nanargmax(bucket))}
    order = sorted(keep)
    return x[order], y[order]


def smoothing_steps(count: int) -> int:
    """The time constant, in steps, that suits a series of `count` points: a fiftieth of it, 1 to 200."""
    return int(np.clip(count // 50, 1, 200))


def smooth(y: Array, steps: int) -> Array:
    """Exponential moving average with the given time constant, free of start-up bias; it skips NaN. [n] -> [n]."""
    keep, total, weight = 1 - 1 / max(steps, 1), 0.0, 0.0
    result = np.full(len(y), np.nan)
    for i, value in enumerate(y):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            result[i] = total / weight
    return result


def mean_over_layers(values: Array) -> Array:
    """[R, L] -> [R], ignoring NaN; NaN where no layer has a value."""
    known = np.isfinite(values)
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
