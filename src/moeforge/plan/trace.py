"""A simulated step as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is Google's Trace Event Format: times are microseconds; pipeline ranks stand as processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moeforge.plan.actions import Action, Kind
from moeforge.plan.simulator import Event, Simulation

KIND_NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "backward input", "W": "backward weight"}
"""What each kind of action is called."""


def chrome_trace(
    simulation: Simulation, live_bytes: Sequence[Sequence[tuple[float, float]]] | None = None
) -> dict[str, Any]:
    """A JSON-ready trace of one step: every action, the update, and arrows along hidden states and their gradients.

    `live_bytes` has for every rank (seconds, bytes) of its activations, each valid until the next; they become a
    counter. Times are rounded to nanoseconds, the resolution of the viewers, so that no box overlaps the next.
    """
    stages: dict[int, set[int]] = {}
    for event in simulation.events:
        stages.setdefault(event.rank, set()).add(event.action.stage)
    found: list[dict[str, Any]] = []
    for rank, own in stages.items():
        name = f"rank {rank}: stage{'s' if len(own) > 1 else ''} {', '.join(map(str, sorted(own)))}"
        found.append(_about(rank, "process_name", name=name))
        found.append(_about(rank, "process_sort_index", sort_index=rank))
        found.append(_about(rank, "thread_name", name="compute"))
    found += [_box(event) for event in simulation.events]
    if simulation.update_seconds > 0:
        begin = simulation.step_seconds - simulation.update_seconds
        found += [_complete(rank, "update", "update", begin, simulation.step_seconds) for rank in stages]
    found += _arrows(simulation.events)
    for rank, samples in enumerate(live_bytes or ()):
        for seconds, amount in samples:
            about = {"ph": "C", "name": "live activations", "pid": rank, "ts": _microseconds(seconds)}
            found.append({**about, "args": {"bytes": amount}})
    return {"traceEvents": found, "displayTimeUnit": "ms"}


def _about(rank: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": 0, "args": args}


def _box(event: Event) -> dict[str, Any]:
    stage, kind, micro_batch = event.action
    made = _complete(event.rank, f"{kind} s{stage} m{micro_batch}", KIND_NAMES[kind], event.start, event.end)
    return {**made, "args": {"stage": stage, "micro_batch": micro_batch}}


def _complete(rank: int, name: str, category: str, start: float, end: float) -> dict[str, Any]:
    begin = _microseconds(start)
    duration = round(_microseconds(end) - begin, 3)
    return {"ph": "X", "name": name, "cat": category, "pid": rank, "tid": 0, "ts": begin, "dur": duration}


def _arrows(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """From each action to the one on another rank that takes its result."""
    by_action = {event.action: event for event in events}
    for number, event in enumerate(events):
        stage, kind, micro_batch = event.action
        if kind == "W":  # its result stays
            continue
        wanted = [Action(stage + 1, "F", micro_batch)]
        if kind != "F":
            wanted = [Action(stage - 1, "B", micro_batch), Action(stage - 1, "I", micro_batch)]
        taker = next((by_action[action] for action in wanted if action in by_action), None)
        if taker is None or taker.rank == event.rank:
            continue
        about = {"name": "hidden state" if kind == "F" else "gradient", "cat": "transfer", "id": number, "tid": 0}
        inside = max(_microseconds(event.start), round(_microseconds(event.end) - 1e-3, 3))  # arrows begin in a box
        yield {**about, "ph": "s", "pid": event.rank, "ts": inside}
        yield {**about, "ph": "f", "bp": "e", "pid": taker.rank, "ts": _microseconds(taker.start)}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e9) / 1e3
