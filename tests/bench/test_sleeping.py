"""Sleeping stages: what torch asks of them in each pass takes its time, and pipelines of them what is simulated."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight

from moeforge.bench.sleeping import Case, Sleeper, SleepingUnit, cases, drawn_unit, forked, measure
from moeforge.layout import require_schedule
from moeforge.model.recompute import recomputed
from moeforge.plan.times import UnitTime

RunRanks = Callable[..., list[Any]]
TIMES = UnitTime(forward=0.01, backward=0.11, backward_input=0.03, backward_weight=0.08, recompute=0.01)


class Recorder(Sleeper):
    """Notes instead of sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def take(self) -> list[float]:
        """What it has noted since it was asked last, in ascending order."""
        taken, self.slept = sorted(self.slept), []
        return taken


def _forward(again: bool = False) -> tuple[Recorder, SleepingUnit, Tensor, Tensor]:
    recorder = Recorder()
    unit = SleepingUnit(TIMES, recorder)
    x = torch.zeros(4, 16, requires_grad=True)
    out = recomputed(unit, x) if again else unit(x)
    assert recorder.take() == [TIMES.forward]
    return recorder, unit, x, out.clone()


def test_split_backward_sleeps_each_part_in_its_pass() -> None:
    recorder, unit, x, out = _forward()
    grads, groups = stage_backward_input([out], [torch.ones(4, 16)], [x], iter(unit.parameters()))
    assert recorder.take() == [TIMES.backward_input] and grads[0] is not None
    stage_backward_weight(iter(unit.parameters()), groups)
    assert recorder.take() == [TIMES.backward_weight]
    assert unit.weight.grad is not None and unit.weight.grad.tolist() == [4.0] * 16


@pytest.mark.parametrize("again", [False, True])
def test_whole_backward_sleeps_all(again: bool) -> None:
    recorder, _, x, out = _forward(again)
    stage_backward((out,), (torch.ones(4, 16),), [x])
    recompute = [TIMES.recompute] if again else []
    assert recorder.take() == [*recompute, TIMES.backward_input, TIMES.backward_weight]


def test_sleeper_counts_from_the_beginning_of_an_action() -> None:
    sleeper = Sleeper()
    begin = time.perf_counter()
    with sleeper.doing("forward"):
        time.sleep(0.02)
        sleeper.sleep(0.03)
        sleeper.sleep(0.02)
    assert 0.05 <= time.perf_counter() - begin < 0.06


@pytest.mark.parametrize("processes", [4, 8, 12])
def test_cases_can_run_and_repeat(processes: int) -> None:
    made = cases(processes)
    assert made == cases(processes) != cases(processes, seed=1)
    assert {(case.schedule, case.chunks) for case in made} == {
        ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("zero-bubble", 1), ("zero-bubble", 2),
        ("zbv", 2),
    }  # fmt: skip
    for case in made:
        require_schedule(case.schedule, len(case.units), processes, case.micro_batches)
        assert 2 * processes <= case.micro_batches <= 3 * processes
        for unit, _ in case.units:
            parts = (unit.forward, unit.backward_input, unit.backward_weight)
            assert min(parts) >= 0.01 and max(parts) <= 0.06
            assert unit.backward == pytest.approx(2 * unit.forward)


def _measured(rank: int) -> list[dict[str, Any]]:
    chance = random.Random(3)
    units = [(drawn_unit(chance, 0.015, 0.02), stage == 5) for stage in range(8)]
    made = [Case("", name, 4, len(units[:n]) // 4, 6, tuple(units[:n])) for name, n in (("1f1b", 4), ("zbv", 8))]
    return measure(made, steps=1)


def test_simulated_times_are_measured(run_ranks: RunRanks) -> None:
    results, *others = run_ranks(4, _measured)
    assert [result["schedule"] for result in results] == ["1f1b", "zbv"]
    for result in results:
        assert abs(result["error"]) < 0.15, result
    assert [[each["simulated_seconds"] for each in other] for other in others] == [
        [each["simulated_seconds"] for each in results]
    ] * 3


def test_forked_processes_report_and_fail() -> None:
    unit = (UnitTime(0.001, 0.002, 0.001, 0.001), False)
    (result,) = forked(2, [Case("short", "1f1b", 2, 1, 4, (unit, unit))])
    assert result["name"] == "short" and len(result["measured"]) == 3 and result["measured_seconds"] >= 0.015
    with pytest.raises(RuntimeError, match="2 processes: ranks .* failed"):
        forked(2, [Case("too few", "1f1b", 2, 1, 1, (unit, unit))])
