"""What a machine gives while a kernel is timed: the rate of reading memory, and of multiplying.

Both take turns with the kernel, as a machine that others use too gives twice as much at one moment as at another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from moeforge.bench.kernels_timing import Seconds

_READ, _MATMUL = "read", "matmul"


class Limits:
    """Reads a buffer of `read_bytes`, and multiplies bf16 [1024, `inner`] by its like of `inner` columns.

    `read` and `matmul` hold what was found, bytes and FLOPs a second.
    """

    def __init__(self, read_bytes: int, inner: int = 2048) -> None:
        self._buffer = torch.ones(read_bytes // 4)
        self._x, self._w = torch.randn(1024, inner).bfloat16(), torch.randn(inner, inner).bfloat16()
        self._flops = 2.0 * self._x.numel() * inner
        self.read: list[float] = []
        self.matmul: list[float] = []

    @property
    def sides(self) -> dict[str, Callable[[], object]]:
        """What is to take turns with the kernels, as `in_turn` wants it."""
        return {_READ: self._buffer.sum, _MATMUL: lambda: self._x @ self._w.t()}

    def of(self, found: Seconds, side: str, read_bytes: float, flops: float) -> dict[str, Any]:
        """What limits a side that in a round reads so many bytes and computes so many FLOPs: the larger of the two
        times; and the fraction of the limit that it reaches: the median over rounds."""
        rounds = zip(found[_READ], found[_MATMUL], found[side], strict=True)
        fractions: dict[str, list[float]] = {"memory": [], "matmul": []}
        for reading, computing, seconds in rounds:
            self.read.append(self._buffer.nbytes / reading)
            self.matmul.append(self._flops / computing)
            fractions["memory"].append(read_bytes / self.read[-1] / seconds)
            fractions["matmul"].append(flops / self.matmul[-1] / seconds)
        medians = {limit: statistics.median(each) for limit, each in fractions.items()}
        limit = max(medians, key=lambda name: medians[name])
        return {"limit": limit, "fraction_of_limit": medians[limit]}
