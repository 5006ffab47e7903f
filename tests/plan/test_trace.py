"""The trace, read back as a viewer reads it."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from moeforge.plan.simulator import Simulation, simulate
from moeforge.plan.times import UnitTime
from moeforge.plan.trace import chrome_trace

SCHEDULES = [("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 2), ("zbv", 2)]


def made(schedule: str, chunks: int, pp: int = 4, micro_batches: int = 8) -> Simulation:
    """Stages of unequal times that no decimal fraction hits."""
    stages = [
        UnitTime(0.01 / 3 + i * 1e-3 / 7, 0.02 / 3, 0.011 / 3, 0.009 / 3, 0.0, 0.1 / 7) for i in range(pp * chunks)
    ]
    return simulate(schedule, pp, micro_batches, stages, 1e-4 / 3)


def loaded(trace: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(json.dumps(trace))["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_boxes_of_a_rank_never_overlap(schedule: str, chunks: int) -> None:
    simulation = made(schedule, chunks)
    boxes = defaultdict(list)
    for event in loaded(chrome_trace(simulation), "X"):
        boxes[event["pid"], event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000)))  # whole ns
    assert len(boxes) == 4
    for own in boxes.values():
        own.sort()
        assert all(start + length <= following for (start, length), (following, _) in zip(own, own[1:], strict=False))
    last = max(start + length for own in boxes.values() for start, length in own)
    assert last == pytest.approx(simulation.step_seconds * 1e9, abs=1)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_every_action_is_there_with_its_time(schedule: str, chunks: int) -> None:
    simulation = made(schedule, chunks)
    categories = {"F": "forward", "B": "backward", "I": "backward input", "W": "backward weight"}
    found = {(event["pid"], event["name"]): event for event in loaded(chrome_trace(simulation), "X") if "args" in event}
    assert len(found) == len(simulation.events)
    for rank, (stage, kind, micro_batch), start, end in simulation.events:
        event = found[rank, f"{kind} s{stage} m{micro_batch}"]
        assert event["cat"] == categories[kind]
        assert event["args"] == {"stage": stage, "micro_batch": micro_batch}
        assert event["ts"] == pytest.approx(start * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx((end - start) * 1e6, abs=2e-3)


def test_ranks_are_named_and_all_update_at_the_end() -> None:
    simulation = made("zbv", 2)
    trace = chrome_trace(simulation)
    names = {event["pid"]: event["args"]["name"] for event in loaded(trace, "M") if event["name"] == "process_name"}
    assert names == {rank: f"rank {rank}: stages {rank}, {7 - rank}" for rank in range(4)}
    updates = [event for event in loaded(trace, "X") if event["cat"] == "update"]
    assert {event["pid"] for event in updates} == set(range(4))
    assert {event["ts"] for event in updates} == {round(simulation.pipeline_seconds * 1e9) / 1e3}
    assert all(event["dur"] == pytest.approx(simulation.update_seconds * 1e6, abs=2e-3) for event in updates)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_arrows_follow_what_travels(schedule: str, chunks: int) -> None:
    """One for every hidden state and gradient that goes to another rank, from a box into a box that begins later."""
    simulation = made(schedule, chunks)
    trace = chrome_trace(simulation)
    boxes = loaded(trace, "X")
    ends = {event["id"]: event for event in loaded(trace, "f")}
    begins = loaded(trace, "s")
    local = 1 if schedule == "zbv" else 0  # the turn of the V stays on its rank
    assert len(begins) == len(ends) == 8 * 2 * (4 * chunks - 1 - local)
    for begin in begins:
        end = ends[begin["id"]]
        (source,) = [b for b in boxes if b["pid"] == begin["pid"] and b["ts"] <= begin["ts"] < b["ts"] + b["dur"]]
        (taker,) = [b for b in boxes if b["pid"] == end["pid"] and b["ts"] == end["ts"]]
        step = 1 if begin["name"] == "hidden state" else -1
        assert taker["args"]["stage"] == source["args"]["stage"] + step
        assert taker["args"]["micro_batch"] == source["args"]["micro_batch"]
        assert end["ts"] > begin["ts"]


def test_memory_is_a_counter_of_each_rank() -> None:
    trace = chrome_trace(made("1f1b", 1, pp=2), [[(0.0, 10.0), (0.5, 20.0)], [(0.25, 7.0)]])
    found = [(event["pid"], event["ts"], event["args"]["bytes"]) for event in loaded(trace, "C")]
    assert found == [(0, 0.0, 10.0), (0, 5e5, 20.0), (1, 2.5e5, 7.0)]
    assert loaded(chrome_trace(made("1f1b", 1)), "C") == []
