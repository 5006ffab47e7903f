"""The optimiser of 1F1B against brute force over the simulator, and on the size that it is made for."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from moeforge.plan.exact import best_1f1b
from moeforge.plan.problem import PipelineProblem, PlanUnit
from moeforge.plan.simulator import simulate
from moeforge.plan.times import UnitTime

Spans = list[tuple[int, int]]
INFINITE = float("inf")


def splits(problem: PipelineProblem) -> Iterator[Spans]:
    for cuts in itertools.combinations(problem.cuts, problem.stages - 1):
        begins = (0, *cuts, len(problem.units))
        yield list(zip(begins, begins[1:], strict=False))


def recomputations(problem: PipelineProblem, begin: int, end: int) -> Iterator[tuple[int, ...]]:
    units = [i for i in range(begin, end) if problem.units[i].recomputable]
    for count in range(len(units) + 1):
        yield from itertools.combinations(units, count)


def fits(problem: PipelineProblem, rank: int, begin: int, end: int, again: tuple[int, ...]) -> bool:
    """1F1B: rank r of p holds min(m, p - r) micro-batches; written down apart from the product."""
    kept, transient, static = problem.boundary, 0, 0
    for i in range(begin, end):
        unit = problem.units[i]
        static += unit.static
        kept += unit.checkpoint if i in again else unit.kept
        transient = max(transient, unit.forward_transient, unit.backward_transient)
        if i in again:  # it runs again beside its output's gradient, and what it would have kept is there
            running = max(unit.backward_transient, unit.forward_transient + unit.checkpoint)
            transient = max(transient, unit.kept - unit.checkpoint + running)
    static += problem.received * ((begin > 0) + (end < len(problem.units)))
    static += problem.tied * (end == len(problem.units) and begin > 0)
    return static + min(problem.micro_batches, problem.pp - rank) * kept + transient <= problem.memory


def best_by_brute_force(problem: PipelineProblem) -> float | None:
    """Seconds of the fastest 1F1B step, None where nothing fits."""
    found = []
    for spans in splits(problem):
        ways = [
            [again for again in recomputations(problem, *span) if fits(problem, rank, *span, again)]
            for rank, span in enumerate(spans)
        ]
        for chosen in itertools.product(*ways):
            stages = [problem.stage(*span, again) for span, again in zip(spans, chosen, strict=True)]
            step = simulate("1f1b", problem.pp, problem.micro_batches, stages, problem.transfer)
            found.append(step.step_seconds)
    return min(found, default=None)


def random_problem(rng: random.Random) -> PipelineProblem:
    """Up to 6 units, alike or not, on up to 4 stages; with and without memory pressure, transfers and ties."""
    count = rng.randint(2, 6)
    units = [_random_unit(rng) for _ in range(count)]
    if rng.random() < 0.5:
        units = [units[0], *(rng.choice(units[:2]) for _ in range(count - 1))]
    pp = rng.randint(1, min(4, count))
    cuts = sorted(rng.sample(range(1, count), rng.randint(pp - 1, count - 1)))
    return PipelineProblem(
        units=tuple(units),
        cuts=tuple(cuts),
        pp=pp,
        micro_batches=rng.randint(pp, pp + 8),
        memory=rng.choice([INFINITE, rng.randint(10, 80)]),
        transfer=rng.choice([0.0, 0.0, 0.5, 2.0]),
        boundary=rng.randint(0, 2),
        received=rng.randint(0, 3),
        tied=rng.randint(0, 4),
        is_tied=rng.random() < 0.5,
        tied_reduction=rng.choice([0.0, 1.5]),
    )


def _random_unit(rng: random.Random) -> PlanUnit:
    forward, backward, kept = rng.randint(1, 9), rng.randint(1, 12), rng.randint(1, 9)
    time_ = UnitTime(forward, backward, backward / 2, backward / 2, rng.randint(0, forward), rng.randint(0, 3))
    small = [rng.randint(0, 3) for _ in range(2)]
    return PlanUnit(time_, rng.randint(0, 5), kept, rng.randint(0, kept), *small, recomputable=rng.random() < 0.8)


def check_against_brute_force(problem: PipelineProblem) -> bool:
    """Whether a split exists; equal times, proven, and what was returned does take that time."""
    found, best = best_1f1b(problem), best_by_brute_force(problem)
    if best is None or found is None:
        assert found is None and best is None, problem
        return False
    assert found.seconds == pytest.approx(best, rel=1e-12), problem
    assert found.gap < 1e-12, problem
    stages = [problem.stage(*span, again) for span, again in zip(found.spans, found.recomputed, strict=True)]
    step = simulate("1f1b", problem.pp, problem.micro_batches, stages, problem.transfer)
    assert step.step_seconds == pytest.approx(best, rel=1e-12)
    peaks = [
        problem.peak_bytes(rank, [span], [again])
        for rank, (span, again) in enumerate(zip(found.spans, found.recomputed, strict=True))
    ]
    assert max(peaks) <= problem.memory
    return True


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    solved = [check_against_brute_force(random_problem(rng)) for _ in range(150)]
    assert any(solved) and not all(solved)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_equal_to_brute_force_on_thousands(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        check_against_brute_force(random_problem(rng))


def large_problem(**changes: Any) -> PipelineProblem:
    """52 MoE layers of the shape of Skywork-MoE, on 12 stages, boundaries anywhere."""
    gb = 10**9
    attention = PlanUnit(UnitTime(4.1, 8.3, 4.1, 4.2, 3.9, 5), 4 * gb // 10, gb // 4, gb // 50, gb // 16, gb // 8)
    experts = PlanUnit(UnitTime(13.2, 26, 13, 13, 12, 50), 58 * gb // 10, 8 * gb // 10, gb // 50, gb // 7, 4 * gb // 10)
    embed = PlanUnit(UnitTime(0.1, 0.2, 0, 0.2, 0, 1), gb // 2, 0, 0, 0, gb // 10, False)
    head = PlanUnit(UnitTime(20, 1, 1, 0, 0, 1), gb // 2, gb // 10, 0, 8 * gb // 10, gb // 10, False)
    units = (embed, *((attention, experts) * 52), head)
    problem = PipelineProblem(units, tuple(range(1, len(units))), 12, 64, 66e9, transfer=1.5, boundary=gb // 25)
    return replace(problem, **changes)


@pytest.mark.parametrize("memory", [INFINITE, 66e9, 50e9, 45e9])
@pytest.mark.parametrize("whole_layers", [True, False])
def test_52_layers_on_12_stages_in_under_two_seconds(memory: float, whole_layers: bool) -> None:
    problem = large_problem(memory=memory)
    if whole_layers:
        problem = replace(problem, cuts=problem.cuts[::2])
    began = time.process_time()
    found = best_1f1b(problem)
    seconds = time.process_time() - began
    assert found is not None and found.gap < 1e-12
    assert seconds < 2.0
    # No boundary moved by one unit makes it faster.
    for k in range(1, 12):
        for move in (-2, 2) if whole_layers else (-1, 1):
            begins = [span[0] for span in found.spans] + [len(problem.units)]
            begins[k] += move
            spans = list(zip(begins, begins[1:], strict=False))
            ways = [problem.options(problem.composition(*span)) for span in spans]
            held = [counts[0][0] for counts in problem.in_flight]
            stages = []
            for rank, (span, way) in enumerate(zip(spans, ways, strict=True)):
                used = problem.static_bytes([span]) + held[rank] * way.kept + way.transient
                if (used > memory).all():
                    break
                again = problem.recomputed_units(*span, way.numbers[(used <= memory).argmax()])
                stages.append(problem.stage(*span, again))
            if len(stages) == 12:
                assert simulate("1f1b", 12, 64, stages, 1.5).step_seconds >= found.seconds * (1 - 1e-12)


def test_tighter_memory_never_makes_it_faster() -> None:
    steps = [best_1f1b(large_problem(memory=memory)) for memory in (INFINITE, 66e9, 50e9, 45e9, 30e9)]
    seconds = [step.seconds for step in steps if step is not None]
    assert seconds == sorted(seconds) and steps[-1] is None


def test_nothing_that_is_slower_than_what_is_known() -> None:
    problem = large_problem(cuts=tuple(range(1, 106, 2)))
    found = best_1f1b(problem)
    assert found is not None
    assert best_1f1b(problem, known=found.seconds) is None
    assert best_1f1b(problem, known=found.seconds * 1.001) is not None


def test_all_splits_of_a_tiny_problem_are_tried() -> None:
    """The brute force itself: 4 units on 2 stages have 3 splits."""
    problem = PipelineProblem((PlanUnit(UnitTime(1, 1)),) * 4, (1, 2, 3), 2, 2)
    assert [[end for _, end in spans] for spans in splits(problem)] == [[1, 4], [2, 4], [3, 4]]
    assert best_by_brute_force(problem) == 12.0
