"""The fastest arrangement of a cluster.

1F1B first, for its splits are quickly proven: in order of what each arrangement would take with equal work on all
ranks, until nothing better has come for a while. Then the other schedules where they can gain most, and last the
boundaries inside layers. Across arrangements nothing is proven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.layout import unit_names
from moeforge.plan.arrangement import Arrangement, arrangements
from moeforge.plan.pieces import hidden_bytes
from moeforge.plan.planner import Plan, make_plan, unit_times
from moeforge.plan.static_memory import unit_static_bytes
from moeforge.plan.workload import Workload

_DESCENTS, _REFINED = 10, 3
"""Arrangements with other schedules that are planned, and those planned again with boundaries inside layers."""
_PATIENCE = 60
"""Arrangements tried in order of their estimate since the last better one, before the rest are given up."""
_SLACK = 1.04
"""Arrangements that seem this much slower than the best are planned too: estimates err, and the next best is shown."""


@dataclass(frozen=True)
class Found:
    """`best` of all plans (None: nothing fits), the next best of other arrangements, fastest first, and how many
    arrangements there were, and were planned."""

    best: Plan | None
    others: tuple[Plan, ...]
    considered: int
    planned: int


def search(
    hardware: HardwareProfile,
    work: Workload,
    fixed: Mapping[str, Any],
    whole_layers: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Found:
    """The plan with the smallest simulated step for this model, batch and cluster.

    `work` gives model, precision, batch and sequence length; `fixed` what of `Arrangement` is not to be chosen.
    """
    wanted = dict(candidates(hardware, work, fixed))
    # 1F1B is planned as a guide to the others even where another schedule is asked for.
    guides = {} if "schedule" not in fixed else dict(candidates(hardware, work, _without_schedule(fixed)))
    works = wanted | {a: own for a, own in guides.items() if a.schedule == "1f1b"}
    ideal = {a: seconds for a, own in works.items() if (seconds := ideal_seconds(hardware, own, a)) is not None}
    plans: dict[Arrangement, Plan] = {}
    planned = 0

    def best() -> float:
        return min((plan.step_seconds for a, plan in plans.items() if a in wanted), default=float("inf"))

    def attempt(a: Arrangement, known: float, whole: bool = True) -> bool:
        nonlocal planned
        progress(a.describe())
        planned += a in wanted
        if (plan := make_plan(hardware, works[a], a, whole, known=known)) is not None:
            plans[a] = plan
        return plan is not None

    # Another schedule may make a good plan of one that 1F1B's bubble spoils: what it could save is allowed for.
    proven = sorted((a for a in ideal if a.schedule == "1f1b"), key=ideal.__getitem__)
    rivals = [a for a in ideal if a.schedule != "1f1b"]
    could_save = dict.fromkeys(ideal, 0.0)
    for a in rivals:
        base = replace(a, schedule="1f1b", chunks=1)
        could_save[base] = max(could_save.get(base, 0.0), ideal.get(base, 0.0) - ideal[a])
    reached, since = float("inf"), 0
    for a in proven:
        worth = reached + could_save[a]
        if ideal[a] < worth and since < _PATIENCE:
            since += bool(plans)
            if attempt(a, worth) and plans[a].step_seconds < reached:
                reached, since = plans[a].step_seconds, 0

    expected = {a: seconds for a in rivals if (seconds := _expected(a, plans, ideal)) is not None}
    found = 0
    for a in sorted(expected, key=expected.__getitem__):
        if found < _DESCENTS and expected[a] < best() * _SLACK:
            found += attempt(a, best() * _SLACK)
    if not any(a in wanted for a in plans):  # what fits least, or has no 1F1B beside it: whatever fits
        for a in sorted((a for a in ideal if a in wanted), key=ideal.__getitem__):
            if not whole_layers and a.schedule == "1f1b":
                attempt(a, best(), whole=False)
            elif a.schedule != "1f1b" and a not in expected and found < _DESCENTS:
                found += attempt(a, best())

    ranked = sorted((plan for a, plan in plans.items() if a in wanted), key=lambda plan: plan.step_seconds)
    if not whole_layers:
        progress("boundaries inside layers")
        ranked[:_REFINED] = [_refined(plan) for plan in ranked[:_REFINED]]
        ranked.sort(key=lambda plan: plan.step_seconds)
    return Found(ranked[0] if ranked else None, tuple(ranked[1:4]), len(wanted), planned)


def _without_schedule(fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fixed.items() if key not in ("schedule", "chunks")}


def _expected(a: Arrangement, plans: Mapping[Arrangement, Plan], ideal: Mapping[Arrangement, float]) -> float | None:
    """What the arrangement would take if it kept all of what 1F1B needs for imbalance and recomputation; None where
    1F1B does not fit or is too slow to have been planned."""
    base = replace(a, schedule="1f1b", chunks=1)
    return None if base not in plans else plans[base].step_seconds - ideal[base] + ideal[a]


def candidates(
    hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]
) -> Iterable[tuple[Arrangement, Workload]]:
    """Arrangements with the work that each makes of `work`. Where the hardware's units were measured for this model,
    only micro-batches that were measured: estimates beside measurements would not compare."""
    measured = hardware.measured_micro_batches(work.model, work.precision, work.sequence_length)
    for a in arrangements(work.model, hardware, work.batch_sequences, fixed, work.group_sequences):
        if not measured or "micro_batch_sequences" in fixed or a.micro_batch_sequences in measured:
            yield a, work_of(work, a)


def work_of(work: Workload, a: Arrangement) -> Workload:
    """The work of a step in this arrangement."""
    micro = a.micro_batch_sequences
    return replace(work, micro_batch_sequences=micro, dp=a.dp, tp=a.tp, ep=a.ep, etp=a.etp)


def ideal_seconds(hardware: HardwareProfile, work: Workload, arrangement: Arrangement) -> float | None:
    """An estimate: a step in which all ranks do equal work, for 1F1B (m + p - 1) / p of a micro-batch's; interleaving
    divides the bubble by its chunks, zero-bubble schedules have none. Uneven stages can be a few per cent faster where
    micro-batches are few. None where the weights, and what torch receives into, are more than all ranks have.
    """
    pp, m = arrangement.pp, work.micro_batches
    names = unit_names(work.model)
    static = sum(unit_static_bytes(work, name) for name in names)
    received = 2 * (pp - 1) * m * hidden_bytes(work)
    largest = max(unit_static_bytes(work, name) for name in names)
    if max((static + received) / pp, largest) > hardware.usable_bytes:
        return None
    times = unit_times(hardware, work)
    split = arrangement.schedule in ("zero-bubble", "zbv")
    whole = sum(t.forward + (t.backward_input + t.backward_weight if split else t.backward) for t in times)
    bubble = 0.0 if split else (pp - 1) / arrangement.chunks
    return (m + bubble) * whole / pp + sum(t.update for t in times) / pp


def _refined(plan: Plan) -> Plan:
    finer = make_plan(plan.hardware, plan.work, plan.arrangement, False, known=plan.step_seconds)
    return finer or plan
