"""What a machine gives while a kernel is timed: the rate of reading memory, and of multiplying.

Both take turns with the kernel, as a machine that others use too gives twice as much at one moment as at another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeforge.bench.kernels_timing import Seconds, in_turn

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

    def in_turn(self, sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """`kernels_timing.in_turn` of the sides and of these two."""
        own: dict[str, Callable[[], object]] = {_READ: self._buffer.sum, _MATMUL: lambda: self._x @ self._w.t()}
        found = in_turn(own | dict(sides), rounds)
        self.read += [self._buffer.nbytes / seconds for seconds in found[_READ]]
        self.matmul += [self._flops / seconds for seconds in found[_MATMUL]]
        return found

    def of(self, found: Seconds, side: str, read_bytes: float, flops: float) -> dict[str, Any]:
        """What mostly limits a side that in a round reads so many bytes and computes so many FLOPs: the larger of the
        two times; and the fraction of the limit that it reaches: the median over rounds."""
        limits, fractions = [], []
        for reading, computing, seconds in zip(found[_READ], found[_MATMUL], found[side], strict=True):
            times = {"memory": read_bytes * reading / self._buffer.nbytes, "matmul": flops * computing / self._flops}
            limits.append(max(times, key=lambda name: times[name]))
            fractions.append(times[limits[-1]] / seconds)
        return {"limit": statistics.mode(limits), "fraction_of_limit": statistics.median(fractions)}
