"""Pipeline schedules as lists of actions: what every rank computes, in its order.

They are those of torch.distributed.pipelining, which `parallel.pipeline` runs; a test holds them equal.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from moeforge.layout import require_schedule

Kind = Literal["F", "B", "I", "W"]
"""Forward, whole backward, backward for the input, backward for the weights (the letters of torch's pipelining)."""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    stage: int
    kind: Kind
    micro_batch: int


@functools.lru_cache(maxsize=256)
def schedule_actions(schedule: str, pp: int, chunks: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of every pipeline rank. `chunks` are the stages of a rank.

    1f1b: PipeDream-flush, and interleaved-1f1b (Narayanan et al., 2021); zero-bubble: ZB-H1, and its interleaved form
    (Qi et al., 2024); zbv: ZB-V of the same authors. Raises UserError for what a schedule cannot run.
    """
    require_schedule(schedule, pp * chunks, pp, micro_batches)
    if pp == 1:  # one rank: gradient accumulation
        there = tuple(Action(stage, "F", 0) for stage in range(chunks))
        back = tuple(Action(stage, "B", 0) for stage in reversed(range(chunks)))
        return (tuple(action._replace(micro_batch=m) for m in range(micro_batches) for action in there + back),)
    if schedule == "zbv":
        return tuple(_zbv(rank, pp, micro_batches) for rank in range(pp))
    if schedule == "zero-bubble":
        return tuple(_zero_bubble(rank, pp, chunks, micro_batches) for rank in range(pp))
    return tuple(_one_f_one_b(rank, pp, chunks, micro_batches) for rank in range(pp))


class _Counted:
    """A list of actions in which micro-batches of a stage and kind are numbered as they come."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.count: Counter[tuple[int, Kind]] = Counter()

    def add(self, stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            self.actions.append(Action(stage, kind, self.count[stage, kind]))
            self.count[stage, kind] += 1

    def below(self, micro_batches: int) -> tuple[Action, ...]:
        return tuple(action for action in self.actions if action.micro_batch < micro_batches)


def _rounds(rank: int, pp: int, chunks: int, micro_batches: int) -> tuple[Iterable[int], Iterable[int], int]:
    """The stages of a rank's forwards and of its backwards in order, and the micro-batches of a round.

    Rounds of about pp micro-batches go through one chunk, then the next (depth first).
    """
    in_round = micro_batches // max(1, micro_batches // pp)
    order = [(i // in_round) % chunks for i in range(chunks * micro_batches)]
    forward = [chunk * pp + rank for chunk in order]
    return forward, [(chunks - 1 - chunk) * pp + rank for chunk in order], in_round


def _one_f_one_b(rank: int, pp: int, chunks: int, micro_batches: int) -> tuple[Action, ...]:
    forward, backward, in_round = _rounds(rank, pp, chunks, micro_batches)
    hop = 2 if chunks > 1 else 1
    ahead = min((chunks - 1) * in_round + hop * (pp - 1 - rank), chunks * micro_batches)
    made, forwards = _Counted(), iter(forward)
    for _ in range(ahead):
        made.add(next(forwards), "F")
    for stage in backward:
        if (following := next(forwards, None)) is not None:
            made.add(following, "F")
        made.add(stage, "B")
    return tuple(made.actions)


def _zero_bubble(rank: int, pp: int, chunks: int, micro_batches: int) -> tuple[Action, ...]:
    """As 1F1B with the backward split: weight gradients wait for `rank` backwards, and so fill the cool-down."""
    forward, backward, in_round = _rounds(rank, pp, chunks, micro_batches)
    ahead = min((chunks - 1) * in_round + pp - 1 - rank, chunks * micro_batches)
    made, forwards, weights = _Counted(), iter(forward), iter(backward)
    for _ in range(ahead):
        made.add(next(forwards), "F")
    for number, stage in enumerate(backward):
        if (following := next(forwards, None)) is not None:
            made.add(following, "F")
        made.add(stage, "I")
        if number >= rank:
            made.add(next(weights), "W")
    for stage in weights:
        made.add(stage, "W")
    return tuple(made.actions)


def _zbv(rank: int, pp: int, micro_batches: int) -> tuple[Action, ...]:
    """Stage `rank` on the way down, stage 2 pp - 1 - rank on the way up."""
    down, up = rank, 2 * pp - 1 - rank
    count = max(2 * pp - 1, micro_batches)  # what fills the pipeline; actions beyond micro_batches are left out below
    made = _Counted()
    for _ in range(2 * (pp - rank) - 1):
        made.add(down, "F")
    for _ in range(rank):
        made.add(up, "F")
        made.add(down, "F")
    for _ in range(pp - rank):
        made.add(up, "F", "I", "W")
    while made.count[up, "F"] < made.count[down, "F"] or made.count[down, "F"] < count:
        if made.count[down, "F"] < count:
            made.add(down, "F")
        made.add(down, "I", "W")
        made.add(up, "F", "I", "W")
    for _ in range(rank):
        made.add(down, "I")
        made.add(up, "I")
    for _ in range(pp - rank):
        made.add(down, "I", "W")
    for stage in (up, down):
        while made.count[stage, "W"] < made.count[stage, "I"]:
            made.add(stage, "W")
    return made.below(micro_batches)
