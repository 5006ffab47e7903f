"""Step time of a 1F1B pipeline from the times of its stages, and the best cut, by trying all.

The planner proper weighs memory, recomputation and other schedules as well; this is its time model for stages whose
forward and backward times are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class UnitTime:
    """Seconds of a unit's forward and backward for one micro-batch, and of its optimiser update once a step."""

    forward: float
    backward: float
    update: float

    def __add__(self, other: UnitTime) -> UnitTime:
        return UnitTime(self.forward + other.forward, self.backward + other.backward, self.update + other.update)


_NOTHING = UnitTime(0.0, 0.0, 0.0)


def one_f_one_b(stages: Sequence[UnitTime], micro_batches: int) -> float:
    """Seconds of one step under 1F1B: the longest chain through forwards, backwards and the last stage's update.

    A stage runs p - 1 - s forwards ahead (s its number of p), then alternates (Narayanan et al., 2021). Transfers
    take no time.
    """
    p = len(stages)
    orders = [_order(p, s, micro_batches) for s in range(p)]
    finished: dict[tuple[str, int, int], float] = {}
    clock, position = [0.0] * p, [0] * p
    while any(position[s] < len(orders[s]) for s in range(p)):
        for s in range(p):
            while position[s] < len(orders[s]):
                kind, m = orders[s][position[s]]
                needs = ("F", s - 1, m) if kind == "F" else ("B", s + 1, m)
                first = s == 0 if kind == "F" else s == p - 1
                if not first and needs not in finished:
                    break
                start = max(clock[s], 0.0 if first else finished[needs])
                clock[s] = start + (stages[s].forward if kind == "F" else stages[s].backward)
                finished[kind, s, m] = clock[s]
                position[s] += 1
    # The gradient norm is a sum over all stages: no update begins before the last backward has ended.
    return max(clock) + max(stage.update for stage in stages)


def _order(p: int, s: int, micro_batches: int) -> list[tuple[str, int]]:
    ahead = min(p - 1 - s, micro_batches)
    order = [("F", m) for m in range(ahead)]
    for m in range(micro_batches):
        if ahead + m < micro_batches:
            order.append(("F", ahead + m))
        order.append(("B", m))
    return order


def stage_times(units: Sequence[UnitTime], boundaries: Sequence[int]) -> list[UnitTime]:
    """The sums of units[0:b1], units[b1:b2], ..., units[bn:]."""
    ends = [0, *boundaries, len(units)]
    return [sum(units[begin:end], _NOTHING) for begin, end in zip(ends, ends[1:], strict=False)]


def best_boundaries(units: Sequence[UnitTime], stages: int, micro_batches: int) -> tuple[int, ...]:
    """The boundaries of the fastest 1F1B pipeline of `stages` stages, by trying all of them."""
    cuts = combinations(range(1, len(units)), stages - 1)
    return min(cuts, key=lambda cut: one_f_one_b(stage_times(units, cut), micro_batches))
