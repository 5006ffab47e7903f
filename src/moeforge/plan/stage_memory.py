"""Memory of pipeline stages and ranks while micro-batches are under way, from that of their units. Sizes in bytes.

What persists through a step besides is in `static_memory`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moeforge.plan.actions import Action
from moeforge.plan.activations import UnitActivations
from moeforge.plan.pieces import hidden_bytes, width
from moeforge.plan.static_memory import unit_parts
from moeforge.plan.workload import Workload


@dataclass(frozen=True)
class StageActivations:
    """Bytes on one rank for one micro-batch of a stage; as in `UnitActivations` as far as names are the same.

    `weight_transient`: what the backward for the weights adds while it runs, where it is apart. A stage that is `whole`
    runs its backward pass as a whole even under schedules that split it. `sent_output` and `sent_gradient`: what stays
    to the end of the step after the backward that frees the rest, and after the backward for the input.
    """

    kept: int
    forward_transient: int
    backward_transient: int
    input_transient: int = 0
    held_gradients: int = 0
    weight_transient: int = 0
    whole: bool = False
    sent_output: int = 0
    sent_gradient: int = 0


@dataclass(frozen=True)
class Boundary:
    """Bytes on one rank that a stage takes besides its units.

    `kept` of each micro-batch from its forward to its backward; `sent_output` and `sent_gradient` as in
    `StageActivations`; `persistent` through the whole run. `weight_transient`: the largest gradient of a weight.
    """

    kept: int
    weight_transient: int = 0
    sent_output: int = 0
    sent_gradient: int = 0
    persistent: int = 0


def stage_activations(
    units: Iterable[tuple[UnitActivations, bool]], boundary: Boundary, tied_gradient: int = 0
) -> StageActivations:
    """Of a stage's units in forward order, each with whether it is recomputed.

    The backward pass frees units from the last to the first, so a unit's transient comes on top of what the units
    before it keep. Before its backward a recomputed unit runs its forward again, beside the gradient of its output,
    which is as large as its input. `tied_gradient`: where embedding and head of the stage share a matrix, the bytes of
    its gradient, which waits from the head's backward for the embedding's.
    """
    everything = list(units)
    kept = forward = backward = boundary.kept
    held, all_held, waits = 0, sum(unit.held_gradients for unit, _ in everything), tied_gradient
    whole, apart = tied_gradient > 0, 0
    for index, (unit, again) in enumerate(everything):
        transient = unit.backward_transient
        if again:
            transient, whole = max(transient, unit.forward_transient + unit.checkpoint), True
        if index + 1 == len(everything):
            waits = 0
        forward = max(forward, kept + unit.kept + unit.forward_transient)
        backward = max(backward, kept + unit.kept + transient + waits)
        held += unit.held_gradients
        apart = max(apart, all_held - held + unit.input_transient)
        kept += unit.checkpoint if again else unit.kept
    return StageActivations(
        kept,
        max(0, forward - kept),
        max(0, backward - kept),
        apart,
        all_held,
        boundary.weight_transient,
        whole,
        boundary.sent_output,
        boundary.sent_gradient,
    )


def peak_activation_bytes(actions: Sequence[Action], stages: Mapping[int, StageActivations]) -> int:
    """The most that the activations of one rank take while it runs its list of actions.

    A split backward frees nothing before its second half, and the first stage of all runs none before it
    (torch.distributed.pipelining's stage_backward_input walks the graph with retain_graph; PipelineStage skips it on
    the first stage).
    """
    live = peak = 0
    for index, kind, _ in actions:
        stage = stages[index]
        if kind == "F":
            live += stage.kept
            peak = max(peak, live + stage.forward_transient)
        elif kind == "B" or kind == ("I" if stage.whole else "W" if index == 0 else ""):
            peak = max(peak, live + stage.backward_transient)
            live -= stage.kept - stage.sent_output - stage.sent_gradient
        elif stage.whole or index == 0:
            continue
        elif kind == "I":
            peak = max(peak, live + stage.input_transient)
            live += stage.held_gradients + stage.sent_gradient
        else:
            peak = max(peak, live + stage.weight_transient)
            live -= stage.kept + stage.held_gradients - stage.sent_output
    return peak


def stage_boundary(
    work: Workload, units: Sequence[str], schedule: str | None = None, previous_here: bool = False,
    next_here: bool = False,
) -> Boundary:  # fmt: skip
    """Of a stage of these units; `schedule` None: no pipeline. The stages before and after it may be on the same rank,
    which then hands over what the others send.

    The units share the rotary embedding's angles and a sliding window's mask. torch's PipelineStage has a receive
    buffer for every micro-batch of a step, for what comes in (the first unit's input lies there) and for gradients of
    what goes out (`_setup_forward_recv_info`, `_create_grad_recv_info`), and keeps the output until the backward. An
    empty stage counts as one between two others. What is sent is held by the list of sends: in torch's runtime of the
    other schedules to the end of the step, in Schedule1F1B until the next gradient is sent.
    """
    c, hidden = work.model, hidden_bytes(work)
    shared = work.tokens * c.head_dim * width(work) if units else 0
    windows = {c.window(int(unit.split(".")[1])) for unit in units if unit.endswith(".attention")}
    if any(window is not None and window < work.sequence_length for window in windows):
        shared += work.sequence_length**2 * width(work)
    if schedule is None:
        return Boundary(shared)
    comes, goes = "embed" not in units, "head" not in units
    to_end = schedule != "1f1b"
    numels = [part.numel for unit in units for part in unit_parts(work, unit)]
    return Boundary(
        shared + hidden * ((goes and not next_here) - (comes and bool(units))),
        max(numels, default=0) * width(work),
        hidden * (goes and to_end and not next_here),
        hidden * (comes and to_end and not previous_here),
        hidden * (work.micro_batches * (comes + goes) + (comes and not to_end)),
    )
