"""A plan as figures and as sentences: what `moeforge plan train` prints."""

from __future__ import annotations

from typing import Any

from moeforge.plan.planner import MFU_CONVENTION, Plan
from moeforge.plan.search import Found


def figures(plan: Plan) -> dict[str, Any]:
    """Steps, shares and stages of a plan, JSON-ready: milliseconds, bytes, tokens."""
    return {
        "stages": [_stage(plan, index) for index in range(len(plan.layout.stages))],
        "step_ms": plan.step_seconds * 1e3,
        "update_ms": plan.simulation.update_seconds * 1e3,
        "bubble_fraction": plan.simulation.bubble_fraction,
        "bubble_by_rank": list(plan.simulation.bubble_by_rank),
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu": plan.mfu,
        "mfu_convention": MFU_CONVENTION,
        "peak_memory_bytes": max(plan.peaks),
        "fits": plan.fits,
    }


def _stage(plan: Plan, index: int) -> dict[str, Any]:
    """`peak_memory_bytes` is that of the rank which runs the stage, its other stages included."""
    layout, stage, time = plan.layout, plan.layout.stages[index], plan.stages[index]
    rank = layout.pp_rank_of(index)
    count = plan.work.model.num_layers
    layers = (min(stage.end_unit, 2 * count + 1) - max(stage.begin_unit, 1)) / 2
    return {
        "pp_rank": rank,
        "layers": max(0, int(layers) if layers == int(layers) else layers),
        "units": [stage.begin_unit, stage.end_unit],
        "recompute_layers": len({unit.rpartition(".")[0] for unit in stage.recompute}),
        "recompute_units": list(stage.recompute),
        "forward_ms": time.forward * 1e3,
        "backward_ms": max(time.backward, time.backward_input + time.backward_weight) * 1e3
        if layout.schedule in ("zero-bubble", "zbv")
        else time.backward * 1e3,
        "update_ms": time.update * 1e3,
        "peak_memory_bytes": plan.peaks[rank],
    }


def alternative(plan: Plan, best: Plan) -> dict[str, Any]:
    """Another arrangement, and how much slower it is."""
    a = plan.arrangement
    sizes = {key: getattr(a, key) for key in ("pp", "dp", "tp", "ep", "etp", "schedule", "chunks")}
    return {
        **sizes,
        "micro_batch_sequences": a.micro_batch_sequences,
        "step_ms": plan.step_seconds * 1e3,
        "slower_by": plan.step_seconds / best.step_seconds - 1,
        "peak_memory_bytes": max(plan.peaks),
    }


def reasons(plan: Plan, uniform: Plan, found: Found | None) -> list[str]:
    """Why this plan: what limits it; and where it was `found` by a search, what was proven and what the next best
    costs."""
    simulation, cap, step = plan.simulation, plan.hardware.usable_bytes, plan.step_seconds
    slowest = max(range(len(simulation.busy_seconds)), key=simulation.busy_seconds.__getitem__)
    fullest = max(range(len(plan.peaks)), key=plan.peaks.__getitem__)
    said = [
        f"rank {slowest} has the most work, {simulation.busy_seconds[slowest] / step:.0%} of the step; ranks wait "
        f"{simulation.bubble_fraction:.1%} of the pipeline's time; the update takes "
        f"{simulation.update_seconds / step:.1%} of the step"
    ]
    again = sum(bool(stage.recompute) for stage in plan.layout.stages)
    memory = f"rank {fullest} is the fullest, {plan.peaks[fullest] / 1e9:.1f} of {cap / 1e9:.1f} GB"
    if not plan.fits:
        said.append(f"{memory}: it does not fit")
    elif again:
        said.append(f"{memory}: {again} of {len(plan.layout.stages)} stages recompute")
    else:
        said.append(f"{memory}: nothing has to be recomputed")
    fits = "" if uniform.fits else ", and would not fit the memory"
    said.append(f"uniform stages take {uniform.step_seconds / step - 1:+.1%}{fits}")
    if plan.work.expert_precision == "fp8" and plan.work.model.moe:
        said.append(f"experts in FP8: memory is counted so, times are those of {plan.work.precision}")
    if found is None:
        return said
    if plan.gap < 1e-9:
        said.append("proven: no other split or recomputation of this arrangement has a shorter simulated step")
    else:
        how = "not proven to the end" if plan.layout.schedule == "1f1b" else "by local search"
        said.append(f"{how}: at most {plan.gap:.1%} above a bound (of other schedules one without any bubble)")
    for other in found.others[:1]:
        said.append(f"next best, {other.step_seconds / step - 1:+.1%}: {other.arrangement.describe()}")
    said.append(f"{found.considered} arrangements considered, {found.planned} planned")
    return said
