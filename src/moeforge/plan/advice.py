"""What would make a plan possible where none is: the smallest change of one thing at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moeforge.config.hardware import HardwareProfile
from moeforge.layout import unit_names
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.exact import best_1f1b
from moeforge.plan.planner import even_layout, make_problem, plan_of_split, rank_peak_bytes
from moeforge.plan.search import candidates
from moeforge.plan.static_memory import unit_static_bytes
from moeforge.plan.workload import Workload

_MOST_NODES = 64
"""Times as many nodes as are tried."""


def advise(hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]) -> str:
    """One line: how much is missing, and the smallest single changes that would fit.

    Tried are other values of each fixed key (nearest first), more nodes, and more memory.
    """
    need = _least_memory(hardware, work, fixed)
    if need is None:
        return _no_arrangement(hardware, work, fixed)
    changes = [
        *_other_values(hardware, work, fixed),
        *_more_nodes(hardware, work, fixed),
    ]
    changes.append(f"devices with {need / 1e9:.1f} GB to use")
    return (
        f"no plan fits: {hardware.name} has {hardware.usable_bytes / 1e9:.1f} GB to use a device, and the fullest one "
        f"needs {need / 1e9:.1f} GB in whole layers, whatever is recomputed. Smallest changes that fit: "
        + "; or ".join(changes)
    )


def _no_arrangement(hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]) -> str:
    """Which fixed key nothing can be arranged with, or else the batch."""
    devices = f"the {hardware.devices} devices of {hardware.name}"
    for key, value in fixed.items():
        rest = {other: kept for other, kept in fixed.items() if other != key}
        found = sorted({str(getattr(a, key)) for a, _ in candidates(hardware, work, rest)}, key=lambda v: (len(v), v))
        if found:
            return (
                f"{_name(key)} = {value}: no pp x dp x tp of {devices} with it divides the batch of "
                f"{work.batch_sequences} sequences into micro-batches that the schedule runs, and has layers and "
                f"experts enough; possible here: {', '.join(found[:12])}"
            )
    given = "".join(f", {_name(key)} = {value}" for key, value in fixed.items())
    return (
        f"train.batch_sequences = {work.batch_sequences}{given}: no pp x dp x tp of {devices} makes whole "
        f"micro-batches of them; use a batch that is a multiple of {hardware.devices}, or fix less"
    )


def _name(key: str) -> str:
    return f"train.{key}" if key == "micro_batch_sequences" else f"parallel.{key}"


def _other_values(hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]) -> Iterable[str]:
    """For each fixed key its nearest value that fits, everything else as it is (but dp, which pp and tp decide)."""
    for key, value in fixed.items():
        dropped = {key, "dp"} if key in ("pp", "tp") else {key}
        free = {other: kept for other, kept in fixed.items() if other not in dropped}
        fitting: dict[tuple[Any, int], float] = {}
        for a, _ in _fitting(hardware, work, free):
            other = getattr(a, key)
            if other != value:
                near = abs(np.log(other / value)) if isinstance(value, int) and value else 0.0
                fitting[other, a.dp] = near
        if fitting:
            nearest, dp = min(fitting, key=lambda found: (fitting[found], str(found)))
            with_it = f" and parallel.dp = {dp}" if "dp" in dropped and "dp" in fixed and key != "dp" else ""
            yield f"{_name(key)} = {nearest} (is {value}){with_it}"


def _more_nodes(hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]) -> Iterable[str]:
    free = {key: value for key, value in fixed.items() if key != "dp"}

    def batch_on(nodes: int) -> int:
        devices = nodes * hardware.devices_per_node
        return -(-work.batch_sequences // devices) * devices

    def fits(nodes: int) -> bool:
        larger = hardware.model_copy(update={"nodes": nodes})
        return any(True for _ in _fitting(larger, replace(work, batch_sequences=batch_on(nodes)), free))

    few, many = hardware.nodes, 2 * hardware.nodes
    while not fits(many):
        few, many = many, 2 * many
        if many > _MOST_NODES * hardware.nodes:
            return
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    batch = batch_on(many)
    with_it = f" with train.batch_sequences = {batch}" if batch != work.batch_sequences else ""
    yield f"{many} nodes (are {hardware.nodes}){with_it}"


def _fitting(
    hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]
) -> Iterable[tuple[Arrangement, Workload]]:
    for a, own in _smallest(hardware, work, fixed):
        cap = hardware.usable_bytes
        if _floor_bytes(own, a) <= cap and least_bytes(hardware, own, a) <= cap:
            yield a, own


def _smallest(
    hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]
) -> Iterable[tuple[Arrangement, Workload]]:
    """Arrangements that take least: 1F1B, unless another schedule is fixed, and the smallest micro-batch."""
    found = [(a, own) for a, own in candidates(hardware, work, fixed) if "schedule" in fixed or a.schedule == "1f1b"]
    smallest: dict[tuple[int, ...], int] = {}
    for a, _ in found:
        key = (a.pp, a.dp, a.tp, a.ep, a.etp)
        smallest[key] = min(a.micro_batch_sequences, smallest.get(key, a.micro_batch_sequences))
    for a, own in found:
        if a.micro_batch_sequences == smallest[a.pp, a.dp, a.tp, a.ep, a.etp]:
            yield a, own


def _floor_bytes(work: Workload, arrangement: Arrangement) -> float:
    """Quickly told: no rank is below the mean, nor below one unit."""
    static = [unit_static_bytes(work, name) for name in unit_names(work.model)]
    return max(sum(static) / arrangement.pp, *static)


def _least_memory(hardware: HardwareProfile, work: Workload, fixed: Mapping[str, Any]) -> float | None:
    least = None
    for a, own in sorted(_smallest(hardware, work, fixed), key=lambda found: _floor_bytes(found[1], found[0])):
        if least is not None and _floor_bytes(own, a) >= least:
            break
        need = least_bytes(hardware, own, a)
        least = need if least is None else min(least, need)
    return least


def least_bytes(hardware: HardwareProfile, work: Workload, arrangement: Arrangement) -> float:
    """The smallest possible fullest rank of an arrangement, whatever is recomputed: over all its splits into whole
    layers. Where ranks have several stages, that of even ones with everything recomputed."""
    if arrangement.chunks > 1:
        layout = even_layout(work, arrangement, work.model.num_layers)
        return max(rank_peak_bytes(work, layout, rank) for rank in range(arrangement.pp))
    problem = make_problem(hardware, work, arrangement, whole_layers=True)
    at = (0, *problem.cuts, len(problem.units))
    best = np.full(len(at), np.inf)
    best[0] = 0.0
    known: dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool, bool], float] = {}
    for rank in range(problem.pp):
        held = problem.in_flight[rank]
        reached = np.full(len(at), np.inf)
        for i in range(len(at) - 1):
            if not np.isfinite(best[i]):
                continue
            for j in range(i + 1, len(at)):
                key = problem.composition(at[i], at[j]), held, i == 0, j == len(at) - 1
                if key not in known:
                    options = problem.options(key[0])
                    static = problem.static_bytes([(at[i], at[j])])
                    known[key] = static + float((options.held_bytes(held) + options.transient).min())
                reached[j] = min(reached[j], max(best[i], known[key]))
        best = reached
    need = float(best[-1])
    split = best_1f1b(replace(problem, memory=need * (1 + 1e-9)))
    # The update may need more than the pipeline, with its buffers.
    return need if split is None else max(need, *plan_of_split(hardware, work, arrangement, split).peaks)
