"""A plan: one arrangement with its units divided over stages, what it takes, and the uniform one beside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeforge.config.hardware import HardwareProfile
from moeforge.layout import Layout, Stage, build_layout, unit_names
from moeforge.plan.actions import schedule_actions
from moeforge.plan.activations import unit_activations
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.cost import model_flops_per_token
from moeforge.plan.estimate import Estimator
from moeforge.plan.exact import Split
from moeforge.plan.local_search import best_split, lower_bound
from moeforge.plan.pieces import hidden_bytes, vocabulary_gradient_bytes
from moeforge.plan.problem import PipelineProblem, PlanUnit
from moeforge.plan.simulator import Simulation, simulate
from moeforge.plan.stage_memory import peak_activation_bytes, stage_activations, stage_boundary
from moeforge.plan.static_memory import static_bytes, unit_static_bytes, update_transient_bytes
from moeforge.plan.times import UnitTime
from moeforge.plan.workload import Workload

MFU_CONVENTION = (
    "6 FLOPs for each weight that a token meets (embedding lookup none, head all, K experts of a layer) and 6 L H h S "
    "for causal attention; recomputation not counted; over the data sheet's peak"
)


@dataclass(frozen=True)
class Plan:
    """`stages` are the times of each stage, recomputation included; `peaks` the bytes of each pipeline rank's fullest
    moment. No split of this arrangement that fits by the optimiser's bound, which adds a stage's largest transient to
    all that it keeps, has a step below `lower_bound` seconds."""

    hardware: HardwareProfile
    work: Workload
    arrangement: Arrangement
    layout: Layout
    stages: tuple[UnitTime, ...]
    simulation: Simulation
    peaks: tuple[int, ...]
    lower_bound: float

    @property
    def step_seconds(self) -> float:
        """One optimiser step."""
        return self.simulation.step_seconds

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of the global batch over the step and all devices."""
        tokens = self.work.batch_sequences * self.work.sequence_length
        return tokens / self.step_seconds / self.layout.world_size

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation by MFU_CONVENTION."""
        dtype = self.work.precision.removesuffix("_pure")
        peak = self.hardware.peak_tflops[dtype] * 1e12  # type: ignore[index]
        return self.tokens_per_second_per_gpu * model_flops_per_token(self.work) / peak

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return max(self.peaks) <= self.hardware.usable_bytes

    @property
    def gap(self) -> float:
        """How far the step may be from the best split of this arrangement; 0 where that is proven."""
        return max(0.0, self.step_seconds / self.lower_bound - 1)


def make_plan(
    hardware: HardwareProfile, work: Workload, arrangement: Arrangement, whole_layers: bool = False,
    known: float = float("inf"),
) -> Plan | None:  # fmt: skip
    """The best split of an arrangement; None where none fits the memory, or is faster than `known` seconds.

    `whole_layers` keeps boundaries between layers.
    """
    split = best_split(make_problem(hardware, work, arrangement, whole_layers), known)
    return None if split is None else plan_of_split(hardware, work, arrangement, split)


@functools.lru_cache(maxsize=64)
def unit_times(hardware: HardwareProfile, work: Workload) -> tuple[UnitTime, ...]:
    """Seconds of every unit of this workload here."""
    return Estimator(hardware, work).units()


def make_problem(
    hardware: HardwareProfile, work: Workload, arrangement: Arrangement, whole_layers: bool
) -> PipelineProblem:
    """What the optimiser is given."""
    model, names = work.model, unit_names(work.model)
    times = unit_times(hardware, work)
    split_backward = arrangement.schedule in ("zero-bubble", "zbv")
    several, hidden = arrangement.pp > 1, hidden_bytes(work)
    known: dict[str, PlanUnit] = {}
    units = []
    for name, time in zip(names, times, strict=True):
        layer = name.split(".")
        number = int(layer[1]) if len(layer) == 3 else 0
        kind = name if len(layer) == 1 else f"{layer[2]} {model.is_moe_layer(number)} {model.window(number)}"
        if kind not in known:
            bytes_ = unit_activations(work, name)
            # Of a stage's input and output one is kept beside the units' own, except at the ends.
            edge = {"embed": hidden, "head": -hidden}.get(name, 0) if several else 0
            known[kind] = PlanUnit(
                time=time,
                static=unit_static_bytes(work, name),
                kept=max(0, bytes_.kept + edge),
                checkpoint=max(0, bytes_.checkpoint + edge),
                forward_transient=bytes_.forward_transient,
                backward_transient=bytes_.backward_transient,
                held_gradients=bytes_.held_gradients if split_backward else 0,
                recomputable=len(layer) == 3,
            )
        units.append(known[kind])
    # Buffers of what a neighbour sends; schedules but 1F1B hold what was sent to it as well, to the end of the step.
    held_messages = 2 * work.micro_batches if arrangement.schedule != "1f1b" else work.micro_batches + 1
    received = held_messages * hidden if several else 0
    estimator = Estimator(hardware, work)
    return PipelineProblem(
        units=tuple(units),
        cuts=tuple(range(1, len(units), 2)) if whole_layers else tuple(range(1, len(units))),
        pp=arrangement.pp,
        micro_batches=work.micro_batches,
        memory=hardware.usable_bytes,
        schedule=arrangement.schedule,
        chunks=arrangement.chunks,
        transfer=estimator.transfer() if several else 0.0,
        boundary=max(stage_boundary(work, [name]).kept for name in names if name.endswith(".attention")),
        received=received,
        tied=unit_static_bytes(work, "embed") if model.tie_embeddings else 0,
        tied_reduction=estimator.tied_reduction() if several else 0.0,
        is_tied=model.tie_embeddings,
        update_transient=lambda spans: update_transient_bytes(
            work, [name for begin, end in spans for name in names[begin:end]]
        ),
    )


def plan_of_split(hardware: HardwareProfile, work: Workload, arrangement: Arrangement, split: Split) -> Plan:
    """The plan that divides units as `split` does."""
    names = unit_names(work.model)
    stages = tuple(
        Stage(begin, end, tuple(names[i] for i in units))
        for (begin, end), units in zip(split.spans, split.recomputed, strict=True)
    )
    micro = arrangement.micro_batch_sequences
    layout = replace(even_layout(work, arrangement, whole=False), stages=stages, micro_batch_sequences=micro)
    return evaluate(hardware, work, arrangement, layout, min(split.lower_bound, split.seconds))


def even_layout(work: Workload, arrangement: Arrangement, recompute: int = 0, whole: bool = True) -> Layout:
    """Layers as even as whole layers allow, extra ones first; every stage recomputes so many of its layers, or all.

    Not `whole`: for its shards alone; then there may be more stages than layers.
    """
    a, model = arrangement, work.model
    count = a.pp * a.chunks
    base, more = divmod(model.num_layers, count)
    layers = [base + (stage < more) for stage in range(count)]
    return build_layout(
        model, pp=a.pp, dp=a.dp, tp=a.tp, ep=a.ep, etp=a.etp, schedule=a.schedule, chunks=a.chunks,
        stages=layers, recompute_layers=[min(recompute, each) for each in layers] if whole else None,
    )  # fmt: skip


def evaluate(
    hardware: HardwareProfile, work: Workload, arrangement: Arrangement, layout: Layout,
    bound: float | None = None,
) -> Plan:  # fmt: skip
    """What a given layout takes."""
    names = unit_names(work.model)
    problem = make_problem(hardware, work, arrangement, True)
    number = {name: i for i, name in enumerate(names)}
    stages = tuple(
        problem.stage(stage.begin_unit, stage.end_unit, [number[name] for name in stage.recompute])
        for stage in layout.stages
    )
    simulation = simulate(layout.schedule, layout.pp, work.micro_batches, stages, problem.transfer)
    peaks = tuple(rank_peak_bytes(work, layout, rank) for rank in range(layout.pp))
    if bound is None:
        bound = lower_bound(problem)
    return Plan(hardware, work, arrangement, layout, stages, simulation, peaks, min(bound, simulation.step_seconds))


def rank_peak_bytes(work: Workload, layout: Layout, rank: int) -> int:
    """The fullest moment of a pipeline rank: in the pipeline or in the update."""
    names, stages = unit_names(work.model), layout.stages_of(rank)
    actions = schedule_actions(layout.schedule, layout.pp, layout.chunks, work.micro_batches)[rank]
    activations, own, persistent = {}, list[str](), 0
    for index in stages:
        stage = layout.stages[index]
        units = names[stage.begin_unit : stage.end_unit]
        own += units
        schedule = layout.schedule if layout.pp > 1 else None
        boundary = stage_boundary(work, units, schedule, index - 1 in stages, index + 1 in stages)
        tied = work.model.tie_embeddings and "embed" in units and "head" in units
        activations[index] = stage_activations(
            ((_activations(work, name), name in stage.recompute) for name in units),
            boundary,
            vocabulary_gradient_bytes(work) if tied else 0,
        )
        persistent += boundary.persistent
    static = static_bytes(work, own) + persistent
    return static + max(peak_activation_bytes(actions, activations), update_transient_bytes(work, own))


_activations = functools.lru_cache(maxsize=4096)(unit_activations)


def uniform_plan(hardware: HardwareProfile, work: Workload, arrangement: Arrangement) -> Plan:
    """Layers as even as whole layers allow, extra layers first, and the smallest single number of recomputed layers
    for all stages that fits (all layers where none does)."""
    most = -(-work.model.num_layers // (arrangement.pp * arrangement.chunks))
    counts: Sequence[int] = range(most + 1)
    for recompute in counts:
        layout = even_layout(work, arrangement, recompute)
        fits = all(rank_peak_bytes(work, layout, rank) <= hardware.usable_bytes for rank in range(layout.pp))
        if fits or recompute == most:
            return evaluate(hardware, work, arrangement, layout)
    raise AssertionError("unreachable")
