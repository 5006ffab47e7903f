"""What a schedule takes, event by event: every action begins when its rank is free and its input is there.

Many candidates of equal schedule are simulated at once, as columns: the order of events depends on the schedule alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeforge.plan.actions import Action, schedule_actions
from moeforge.plan.times import UnitTime

Array = NDArray[np.float64]
_FIELDS = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}


class Event(NamedTuple):
    """An action on a pipeline rank, from `start` to `end` (seconds)."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """One optimiser step. `events` in rank order, then in time order; `update_seconds` follow the last of them."""

    events: tuple[Event, ...]
    update_seconds: float

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return self.events[-1].rank + 1

    @functools.cached_property
    def pipeline_seconds(self) -> float:
        """Until the last backward has ended."""
        return max(event.end for event in self.events)

    @property
    def step_seconds(self) -> float:
        """The pipeline and the update."""
        return self.pipeline_seconds + self.update_seconds

    @functools.cached_property
    def busy_seconds(self) -> tuple[float, ...]:
        """What each rank computes before the update."""
        busy = [0.0] * self.ranks
        for event in self.events:
            busy[event.rank] += event.end - event.start
        return tuple(busy)

    @property
    def bubble_by_rank(self) -> tuple[float, ...]:
        """The share of the pipeline's time that each rank waits."""
        whole = self.pipeline_seconds
        return tuple(max(0.0, 1 - busy / whole) if whole else 0.0 for busy in self.busy_seconds)

    @property
    def bubble_fraction(self) -> float:
        """The mean over ranks: imbalance, filling and draining, and transfers."""
        return sum(self.bubble_by_rank) / self.ranks


class _Node(NamedTuple):
    """An action whose rank did node `before` last, and whose input node `source` makes (-1: none), `remote` if on
    another rank."""

    rank: int
    action: Action
    before: int
    source: int
    remote: bool


class Program:
    """The actions of all ranks in an order in which each comes after what it waits for.

    `late`: a rank asks for what it receives only once it is free, as torch's Schedule1F1B does, so that no transfer
    hides behind its computation; the runtime of torch's other schedules asks ahead.
    """

    def __init__(self, actions: Sequence[Sequence[Action]], late: bool = False) -> None:
        self.nodes: list[_Node] = []
        self.late = late
        where = {action: rank for rank, own in enumerate(actions) for action in own}
        last = max(action.stage for action in where)
        number: dict[Action, int] = {}
        position, before = [0] * len(actions), [-1] * len(actions)
        while len(self.nodes) < len(where):
            reached = len(self.nodes)
            for rank, own in enumerate(actions):
                while position[rank] < len(own):
                    action = own[position[rank]]
                    needed = _input_of(action, last, where)
                    if needed is not None and needed not in number:
                        break
                    source = -1 if needed is None else number[needed]
                    remote = needed is not None and where[needed] != rank
                    number[action] = len(self.nodes)
                    self.nodes.append(_Node(rank, action, before[rank], source, remote))
                    before[rank] = number[action]
                    position[rank] += 1
            if len(self.nodes) == reached:
                raise ValueError(f"no action can begin after {reached} of {len(where)}: ranks wait for one another")
        self.ends = [index for index in before if index >= 0]

    def seconds(self, stages: dict[str, Array], transfer: float) -> Array:
        """Until all is done: [N], of stage times [S, N] by kind of action."""
        ends = self._run(stages, transfer)
        return np.max([ends[index] for index in self.ends], axis=0)

    def events(self, stages: Sequence[UnitTime], transfer: float) -> tuple[Event, ...]:
        """The run of one candidate, in rank order."""
        times = columns([stages])
        ends = self._run(times, transfer)
        found = [
            Event(node.rank, node.action, float(end[0] - times[node.action.kind][node.action.stage][0]), float(end[0]))
            for node, end in zip(self.nodes, ends, strict=True)
        ]
        return tuple(sorted(found, key=lambda event: event.rank))

    def _run(self, stages: dict[str, Array], transfer: float) -> list[Array]:
        zero = np.zeros(next(iter(stages.values())).shape[1])
        ends: list[Array] = []
        for _, (stage, kind, _), before, source, remote in self.nodes:
            begin = zero if before < 0 else ends[before]
            if source >= 0 and source != before:
                if remote and not self.late:
                    begin = np.maximum(begin, ends[source] + transfer)
                else:
                    begin = np.maximum(begin, ends[source]) + (transfer if remote else 0.0)
            ends.append(begin + stages[kind][stage])
        return ends


def _input_of(action: Action, last: int, known: dict[Action, int]) -> Action | None:
    """The action whose result this one takes; None where there is none, or where the rank's own order says it all."""
    stage, kind, m = action
    if kind == "F":
        return Action(stage - 1, "F", m) if stage else None
    if kind == "W" or stage == last:
        return None
    split = Action(stage + 1, "I", m)
    return split if split in known else Action(stage + 1, "B", m)


def columns(candidates: Sequence[Sequence[UnitTime]]) -> dict[str, Array]:
    """Stage times of candidates as the columns that `Program.seconds` takes."""
    return {
        kind: np.array([[getattr(stage, field) for stage in stages] for stages in candidates]).T
        for kind, field in _FIELDS.items()
    }


@functools.lru_cache(maxsize=256)
def program(schedule: str, pp: int, chunks: int, micro_batches: int) -> Program:
    """The program of a schedule. Raises UserError for what it cannot run."""
    return Program(schedule_actions(schedule, pp, chunks, micro_batches), late=schedule == "1f1b")


def simulate(
    schedule: str, pp: int, micro_batches: int, stages: Sequence[UnitTime], transfer_seconds: float = 0.0
) -> Simulation:
    """One step of stages (in pipeline order, several a rank for schedules that take them). A hidden state or its
    gradient needs `transfer_seconds` to another rank; the sender computes meanwhile, the receiver as `Program` says.

    The update begins when all ranks are done, since the gradient norm is a sum over all of them.
    """
    made = program(schedule, pp, len(stages) // pp, micro_batches)
    return Simulation(made.events(stages, transfer_seconds), update_seconds(schedule, pp, stages))


def update_seconds(schedule: str, pp: int, stages: Sequence[UnitTime]) -> float:
    """The longest update of a rank: the sum over its stages."""
    totals = [0.0] * pp
    for index, stage in enumerate(stages):
        rank = min(index, len(stages) - 1 - index) if schedule == "zbv" else index % pp
        totals[rank] += stage.update
    return max(totals)
