"""The simulator against formulas of the literature, a recursion written apart from it, and by hand."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.plan.actions import Action, schedule_actions
from moeforge.plan.simulator import Program, columns, program, simulate
from moeforge.plan.times import UnitTime

SECONDS = st.integers(1, 9).map(float)
TIMES = st.builds(UnitTime, SECONDS, SECONDS, SECONDS, SECONDS, st.just(0.0), SECONDS)
SCHEDULES = [("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2)]


def same(forward: float, backward: float, weight: float = 0.0) -> UnitTime:
    return UnitTime(forward, backward + weight, backward, weight)


@given(st.integers(1, 6), st.integers(0, 8), SECONDS, SECONDS)
def test_equal_stages_take_what_the_formula_says(p: int, more: int, forward: float, backward: float) -> None:
    """1F1B: (m + p - 1) (F + B) (Narayanan et al., 2021)."""
    m = p + more
    found = simulate("1f1b", p, m, [same(forward, backward)] * p)
    assert found.step_seconds == pytest.approx((m + p - 1) * (forward + backward))
    assert found.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("p", [2, 4, 6])
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_bubble(p: int, chunks: int) -> None:
    """(p - 1) (F + B) / v of the whole pass through a rank (Narayanan et al., 2021)."""
    m = 4 * p
    found = simulate("interleaved-1f1b", p, m, [same(1.0, 2.0)] * (p * chunks))
    assert found.pipeline_seconds - m * chunks * 3.0 == pytest.approx((p - 1) * 3.0)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_zero_bubble_schedules_at_equal_passes(p: int) -> None:
    """With F = I = W: a third of 1F1B's bubble for ZB-H1; none in ZB-V but for filling (Qi et al., 2024)."""
    m = 4 * p
    h1 = simulate("zero-bubble", p, m, [same(1.0, 1.0, 1.0)] * p)
    assert h1.pipeline_seconds - 3 * m == pytest.approx(p - 1)
    v = simulate("zbv", p, m, [same(1.0, 1.0, 1.0)] * (2 * p))
    busy_from_first_to_last = [
        max(e.end for e in v.events if e.rank == r) - min(e.start for e in v.events if e.rank == r) for r in range(p)
    ]
    assert busy_from_first_to_last == pytest.approx([6.0 * m] * p)


def test_two_uneven_stages_by_hand() -> None:
    """Stage 0: F 1, B 2; stage 1: F 3, B 4. F0 F0 | 1..4 F1, 4..8 B1, 8..10 B0, while stage 1: 8..11 F1, 11..15 B1;
    stage 0 ends with 15..17 B0; then the longer update."""
    stages = [UnitTime(1, 2, update=5), UnitTime(3, 4, update=6)]
    found = simulate("1f1b", 2, 2, stages)
    assert found.step_seconds == 17 + 6 and found.busy_seconds == (6.0, 14.0)
    # Half a second before F0 and F1 of stage 1 and before B1 of stage 0; before B0 it is free.
    assert simulate("1f1b", 2, 2, stages, 0.5).pipeline_seconds == 17 + 1.5


@given(st.sampled_from(SCHEDULES), st.integers(2, 4), st.integers(1, 3), st.data())
def test_longest_path(schedule: tuple[str, int], pp: int, rounds: int, data: st.DataObject) -> None:
    """Against the recursion "an action ends when the one before it and its input have", written down directly."""
    name, chunks = schedule
    m = rounds * pp
    stages = data.draw(st.lists(TIMES, min_size=pp * chunks, max_size=pp * chunks))
    transfer = data.draw(st.sampled_from([0.0, 0.25]))
    actions = schedule_actions(name, pp, chunks, m)
    rank_of = {action.stage: rank for rank, own in enumerate(actions) for action in own}
    before = {a: own[i - 1] if i else None for own in actions for i, a in enumerate(own)}
    fields = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}

    @functools.cache
    def end(action: Action) -> float:
        stage, kind, micro_batch = action
        previous = before[action]
        free, arrived, receiving = 0.0 if previous is None else end(previous), 0.0, 0.0
        neighbour = stage - 1 if kind == "F" else stage + 1
        if kind != "W" and 0 <= neighbour < len(stages):
            travels = transfer * (rank_of[neighbour] != rank_of[stage])
            receiving = travels if name == "1f1b" else 0.0  # asked for only when the rank is free
            arrived = end(Action(neighbour, kind, micro_batch)) + travels - receiving
        return max(free, arrived) + receiving + getattr(stages[stage], fields[kind])

    found = simulate(name, pp, m, stages, transfer)
    assert {event.action: event.end for event in found.events} == {a: end(a) for own in actions for a in own}
    assert found.pipeline_seconds == max(end(a) for own in actions for a in own)
    one = program(name, pp, chunks, m).seconds(columns([stages, stages[::-1]]), transfer)
    assert one[0] == found.pipeline_seconds


def test_the_update_is_the_sum_of_a_ranks_stages() -> None:
    stages = [UnitTime(1, 1, 1, 0, 0, update) for update in (1.0, 2.0, 4.0, 8.0)]
    assert simulate("interleaved-1f1b", 2, 2, stages).update_seconds == 10.0
    assert simulate("zbv", 2, 3, stages).update_seconds == 9.0


def test_ranks_that_wait_for_one_another_are_an_error() -> None:
    with pytest.raises(ValueError, match="wait for one another"):
        Program([[Action(0, "B", 0), Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "B", 0)]])
