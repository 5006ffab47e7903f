"""Scaling on paper: the best plan at every cluster size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.plan.planner import Plan, uniform_plan
from moeforge.plan.search import search
from moeforge.plan.summary import MFU_CONVENTION
from moeforge.plan.workload import Workload


def sizes(first: int, last: int) -> list[int]:
    """Powers of two times `first`, up to `last`."""
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def sweep(
    hardware: HardwareProfile, work: Workload, devices: list[int], batch: Callable[[HardwareProfile], int],
    fixed: Mapping[str, Any], progress: Callable[[str], None] = lambda stage: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for every number of devices, on nodes of `hardware`; `batch` gives the sequences of a step on a cluster.

    Rows where nothing fits hold only `devices` and None.
    """
    per_node = hardware.devices_per_node
    for count in devices:
        nodes = max(1, count // per_node)
        size = {"name": f"{nodes}x{min(count, per_node)}-{hardware.name}", "nodes": nodes}
        cluster = hardware.model_copy(update=size | {"devices_per_node": min(count, per_node)})
        own = replace(work, batch_sequences=batch(cluster))
        name = cluster.name

        def say(stage: str, name: str = name) -> None:
            progress(f"{name}: {stage}")

        found = search(cluster, own, fixed, progress=say)
        yield _row(cluster, own, found.best)


def _row(cluster: HardwareProfile, work: Workload, plan: Plan | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "cluster": cluster.name,
        "devices": cluster.devices,
        "batch_sequences": work.batch_sequences,
        "memory_cap_bytes": cluster.usable_bytes,
        "mfu_convention": MFU_CONVENTION,
    }
    if plan is None:
        keys = ("tokens_per_second_per_gpu", "mfu", "bubble_fraction", "peak_memory_bytes", "step_ms", "speedup")
        return row | dict.fromkeys((*keys, "uniform_tokens_per_second_per_gpu", "arrangement", "sizes"))
    uniform = uniform_plan(cluster, plan.work, plan.arrangement)
    return row | {
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu": plan.mfu,
        "bubble_fraction": plan.simulation.bubble_fraction,
        "peak_memory_bytes": max(plan.peaks),
        "step_ms": plan.step_seconds * 1e3,
        "speedup": uniform.step_seconds / plan.step_seconds,
        "uniform_tokens_per_second_per_gpu": uniform.tokens_per_second_per_gpu if uniform.fits else None,
        "arrangement": plan.arrangement.describe(),
        "sizes": asdict(plan.arrangement),
    }
