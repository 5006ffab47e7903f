from __future__ import annotations

from moeforge.plan.problem import PipelineProblem, PlanUnit, most_bytes
from moeforge.plan.times import UnitTime

TIME = UnitTime(forward=1.0, backward=2.0, backward_input=1.0, backward_weight=1.0, recompute=1.0, update=0.0)
UNIT = PlanUnit(TIME, static=1000, kept=10, checkpoint=2, held_gradients=3)


def problem(schedule: str) -> PipelineProblem:
    return PipelineProblem((UNIT,) * 8, tuple(range(1, 8)), 4, 16, schedule=schedule)


def test_1f1b_holds_as_many_as_there_are_stages_to_come_and_no_halves() -> None:
    assert problem("1f1b").in_flight == (((4, 0),), ((3, 0),), ((2, 0),), ((1, 0),))


def test_zero_bubble_puts_off_the_more_weight_halves_the_later_the_stage() -> None:
    """torch's schedule; the first stage does both halves in the second."""
    assert [max(gradients for _, gradients in counts) for counts in problem("zero-bubble").in_flight] == [0, 2, 3, 4]
    assert all(max(kept for kept, _ in counts) == 4 for counts in problem("zero-bubble").in_flight)


def test_gradients_between_the_halves_count_for_units_that_are_not_recomputed() -> None:
    split = problem("zero-bubble")
    assert most_bytes([(4, 1), (3, 3)], [10], [3]) == 43
    assert split.peak_bytes(0, [(0, 2)], [()]) == 2000 + 4 * 20
    last = split.in_flight[3]
    assert split.peak_bytes(3, [(6, 8)], [()]) == 2000 + most_bytes(last, [20], [6])
    assert split.peak_bytes(3, [(6, 8)], [(6,)]) == 2000 + most_bytes(last, [12], [3]) + 10  # what it kept, again
    ways = split.options(split.composition(6, 8))
    assert ways.held_bytes(last).tolist() == [most_bytes(last, [20 - 8 * n], [6 - 3 * n]) for n in range(3)]
