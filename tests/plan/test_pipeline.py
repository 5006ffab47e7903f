"""The time model of 1F1B, and the best cut under it."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.plan.pipeline import UnitTime, best_boundaries, one_f_one_b, stage_times

SECONDS = st.integers(1, 9).map(float)
STAGES = st.lists(st.builds(UnitTime, SECONDS, SECONDS, st.just(0.0)), min_size=1, max_size=5)


@given(st.integers(1, 6), st.integers(1, 12), SECONDS, SECONDS)
def test_equal_stages_take_what_the_formula_says(p: int, m: int, forward: float, backward: float) -> None:
    """(m + p - 1) (F + B), the GPipe and 1F1B bubble (Narayanan et al., 2021)."""
    assert one_f_one_b([UnitTime(forward, backward, 0.0)] * p, m) == pytest.approx((m + p - 1) * (forward + backward))


@given(STAGES, st.integers(1, 8))
def test_no_stage_is_idle_for_free(stages: list[UnitTime], m: int) -> None:
    """Between the busiest stage alone and all stages one after another."""
    found = one_f_one_b(stages, m)
    work = [stage.forward + stage.backward for stage in stages]
    assert max(work) * m + (sum(work) - max(work)) * (m == 1) <= found <= sum(work) * m


def test_two_uneven_stages_by_hand() -> None:
    """Stage 0: F 1, B 2; stage 1: F 3, B 4. F0 F0 | 1..4 F1, 4..8 B1, 8..10 B0, while stage 1: 8..11 F1, 11..15 B1;
    stage 0 ends with 15..17 B0; then the longer update."""
    assert one_f_one_b([UnitTime(1, 2, 5), UnitTime(3, 4, 6)], 2) == 17 + 6


@given(st.lists(st.builds(UnitTime, SECONDS, SECONDS, SECONDS), min_size=4, max_size=7), st.integers(1, 3))
def test_the_best_cut_is_the_best_of_all(units: list[UnitTime], stages: int) -> None:
    cuts = list(combinations(range(1, len(units)), stages - 1))
    found = best_boundaries(units, stages, 8)
    assert found in cuts
    seconds = {cut: one_f_one_b(stage_times(units, cut), 8) for cut in cuts}
    assert seconds[found] == min(seconds.values())


def test_stage_times_are_sums() -> None:
    units = [UnitTime(i, 10 * i, 100 * i) for i in range(1, 5)]
    assert stage_times(units, (1, 3)) == [UnitTime(1, 10, 100), UnitTime(5, 50, 500), UnitTime(4, 40, 400)]
