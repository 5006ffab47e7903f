"""Dividing units over ranks: the one place where "who holds what" is decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from moeforge.errors import UserError

Range = tuple[int, int]
"""Begin (included) and end (excluded)."""


def partition(
    units: int,
    ranks: int,
    weights: Sequence[Fraction | float] | None = None,
    carry: Sequence[Fraction | float] | None = None,
) -> tuple[tuple[Range, ...], tuple[Fraction, ...]]:
    """Divides `units` into `ranks` contiguous ranges, sized after `weights` (None: equal), by largest
    remainder.

    A rank whose exact share is q = units * weight / sum(weights) gets floor(q) units and, when its remainder
    plus its `carry` is among the largest (ties: lowest rank), one more; a rank of weight 0 gets none. The
    second result is the carry for the next layer: what each rank is still owed, summing to 0. Passing it on
    makes the extra units rotate from layer to layer, each layer staying within one unit of its exact shares:

    - equal weights: over any layers each rank's total stays within one unit of its exact total, because the
      extra units always go to the ranks that had the fewest;
    - other weights: the sum over ranks of the squared carries grows by at most sum(r (1 - r)) <= ranks / 4 a
      layer, r the remainders (those chosen have the largest carry + r), so averages over layers converge to
      the exact shares.

    Shares and carries are exact fractions: the result is the same on every machine.

    Raises UserError for a negative number of units, no ranks, and weights or carries that do not fit.
    """
    if units < 0:
        raise UserError(f"units = {units}: must be at least 0")
    if ranks < 1:
        raise UserError(f"ranks = {ranks}: must be at least 1")
    shares = [Fraction(1)] * ranks if weights is None else _fractions("weights", weights, ranks)
    if min(shares) < 0 or not any(shares):
        raise UserError(f"weights = {_show(weights)}: must be at least 0 each, and not all 0")
    owed = [Fraction(0)] * ranks if carry is None else _fractions("carry", carry, ranks)

    total = sum(shares)
    quotas = [units * share / total for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    due = [owe + quota - count for owe, quota, count in zip(owed, quotas, counts, strict=True)]
    eligible = [rank for rank in range(ranks) if shares[rank]]
    for rank in sorted(eligible, key=lambda rank: (-due[rank], rank))[: units - sum(counts)]:
        counts[rank] += 1
        due[rank] -= 1

    ranges, begin = [], 0
    for count in counts:
        ranges.append((begin, begin + count))
        begin += count
    return tuple(ranges), tuple(due)


def _fractions(key: str, values: Sequence[Fraction | float], ranks: int) -> list[Fraction]:
    if len(values) != ranks:
        raise UserError(f"{key} = {_show(values)}: must have one number for each of the {ranks} ranks")
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"{key} = {_show(values)}: must be finite numbers")
    return [Fraction(value) for value in values]


def _show(values: Sequence[Fraction | float] | None) -> str:
    return ",".join(str(value) for value in values or ())
