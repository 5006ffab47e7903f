"""EDP, EP, ETP and the mixtures between them on one cluster shape: what each sends where, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from moeforge.config.hardware import HardwareProfile
from moeforge.layout import unit_names
from moeforge.plan.arrangement import Arrangement, expert_modes
from moeforge.plan.cost import GroupName, Message, Pass, UnitCost, unit_cost
from moeforge.plan.estimate import Estimator
from moeforge.plan.planner import make_plan
from moeforge.plan.search import work_of
from moeforge.plan.static_memory import unit_static_bytes
from moeforge.plan.workload import Workload


@dataclass(frozen=True)
class ModeCost:
    """What an expert mode takes in a step, on a rank: the mean over pipeline stages, recomputation not counted.

    Bytes are those that the rank sends, inside its node and to others. `tokens`: to experts and back, forward and
    backward of all micro-batches, and what the block's ranks tell each other for it. `experts`: gradients and updated
    weights of experts with copies. `tp`: into, out of and inside tensor-parallel regions. `tokens_exposed_seconds` of
    a step nothing is computed, while tokens travel. `static_bytes`: weights, gradients and optimiser state.
    """

    static_bytes: int
    weights_fit: bool
    tokens_inside_bytes: int
    tokens_across_bytes: int
    experts_inside_bytes: int
    experts_across_bytes: int
    tp_inside_bytes: int
    tp_across_bytes: int
    tokens_exposed_seconds: float


@dataclass(frozen=True)
class ModePlan:
    """The best plan with whole layers; `peak_bytes` of its fullest rank."""

    peak_bytes: int
    step_seconds: float
    tokens_per_second_per_gpu: float


@dataclass(frozen=True)
class ModeRow:
    """An expert mode. Without experts enough it is not `feasible` and has no `cost`; where no split into stages fits
    the memory it has no `plan`. `reason` says why."""

    mode: str
    ep: int
    etp: int
    expert_dp: int | None
    feasible: bool
    reason: str | None = None
    cost: ModeCost | None = None
    plan: ModePlan | None = None


def compare_modes(hardware: HardwareProfile, work: Workload, arrangement: Arrangement) -> list[ModeRow]:
    """Every expert mode with a name, feasible or not, then the mixtures for which there are experts enough.

    `arrangement` gives all but ep and etp, `work` all that an arrangement does not.
    """
    assert work.model.moe is not None
    dp, tp, experts = arrangement.dp, arrangement.tp, work.model.moe.num_experts
    modes = {"edp": (tp, 1), "ep": (dp * tp, 1), "etp": (dp, tp)}
    mixtures = [sizes for sizes in expert_modes(work.model, dp, tp) if sizes not in modes.values()]
    rows, known = [], dict[tuple[int, int], ModeRow]()
    for mode, (ep, etp) in (*modes.items(), *(("custom", sizes) for sizes in mixtures)):
        if ep > experts:
            reason = f"needs {ep} experts, the model has {experts}"
            rows.append(ModeRow(mode, ep, etp, None, False, reason))
            continue
        if (ep, etp) not in known:
            known[ep, etp] = _row(hardware, work, replace(arrangement, ep=ep, etp=etp))
        rows.append(replace(known[ep, etp], mode=mode))
    return rows


def _row(hardware: HardwareProfile, work: Workload, arrangement: Arrangement) -> ModeRow:
    work = work_of(work, arrangement)
    cost = mode_cost(hardware, work, arrangement.pp)
    plan = make_plan(hardware, work, arrangement, whole_layers=True) if cost.weights_fit else None
    reason = None
    if not cost.weights_fit:
        reason = (
            f"weights, gradients and optimizer state take {cost.static_bytes / 1e9:.1f} GB of the "
            f"{hardware.usable_bytes / 1e9:.1f} GB that a device may use"
        )
    elif plan is None:
        proven = arrangement.schedule == "1f1b"
        none = "no division of the layers fits the memory, whatever is recomputed"
        reason = none if proven else "no plan was found that fits the memory"
    found = None
    if plan is not None:
        found = ModePlan(max(plan.peaks), plan.step_seconds, plan.tokens_per_second_per_gpu)
    return ModeRow(
        arrangement.expert_mode, arrangement.ep, arrangement.etp, work.expert_dp, True, reason, cost, found
    )  # fmt: skip


def mode_cost(hardware: HardwareProfile, work: Workload, pp: int) -> ModeCost:
    """What the workload's expert mode takes, on the mean of `pp` stages."""
    estimator = Estimator(hardware, work)
    names = unit_names(work.model)
    costs = [unit_cost(work, name) for name in names]
    static = sum(unit_static_bytes(work, name) for name in names) / pp

    def sent(group: GroupName) -> tuple[int, int]:
        messages = [message for cost in costs for message in _of_step(cost, work.micro_batches, group)]
        across = sum(estimator.outside_bytes(message) for message in messages)
        return round((sum(message.bytes for message in messages) - across) / pp), round(across / pp)

    waiting = sum(_exposed(estimator, each) for cost in costs for each in (cost.forward, cost.backward))
    tokens, experts, tp = sent("block"), sent("expert_dp"), sent("tp")
    return ModeCost(
        round(static), static <= hardware.usable_bytes, *tokens, *experts, *tp, work.micro_batches * waiting / pp
    )


def _of_step(cost: UnitCost, micro_batches: int, group: GroupName) -> Iterable[Message]:
    """All that a unit sends over a group in a step."""
    for message in cost.forward.messages + cost.backward.messages:
        if message.group == group:
            yield message._replace(bytes=micro_batches * message.bytes)
    yield from (message for message in cost.update.messages if message.group == group)


def _exposed(estimator: Estimator, work: Pass) -> float:
    """Seconds in which only tokens travel to experts or back."""
    messages = tuple(message for message in work.messages if message.group == "block")
    return estimator.exposed(replace(work, messages=messages), estimator.compute(work)) if messages else 0.0


def flat(row: ModeRow) -> dict[str, Any]:
    """JSON-ready; figures that a mode has not are None."""
    figures: dict[str, Any] = {}
    for part, kind in ((row.cost, ModeCost), (row.plan, ModePlan)):
        figures |= {name: getattr(part, name, None) for name in kind.__dataclass_fields__}
    head = {name: getattr(row, name) for name in ("mode", "ep", "etp", "expert_dp", "feasible")}
    return {**head, "fits": row.plan is not None, "reason": row.reason, **figures}
