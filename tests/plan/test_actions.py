"""The action lists against torch's own schedules, which the pipeline executor runs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moeforge.errors import UserError
from moeforge.plan.actions import schedule_actions

TORCH: dict[str, Any] = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


class _Recorder:
    """A stage without computation or transfers, which notes what torch's 1F1B loop asks of it."""

    def __init__(self, rank: int) -> None:
        self.stage_index, self.calls = rank, list[tuple[int, str, int]]()

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self.calls.append((self.stage_index, "F", micro_batch))

    def backward_one_chunk(self, micro_batch: int, **_: Any) -> None:
        self.calls.append((self.stage_index, "B", micro_batch))

    def __getattr__(self, name: str) -> Any:
        return lambda micro_batch: []  # transfers


def one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[tuple[int, str, int]]:
    """What torch's 1F1B really runs; the order that it can also print numbers the last rank's forwards wrongly."""
    nothing: Any = lambda *_, **__: None  # noqa: E731
    stage = _Recorder(rank)
    schedule: Any = SimpleNamespace(
        _stage=stage, _num_stages=pp, _n_microbatches=micro_batches, scale_grads=False, _initialize_stage=nothing,
        _check_inputs=lambda *_: ([()] * micro_batches, [{}] * micro_batches), _maybe_compute_loss=nothing,
        _maybe_get_loss=nothing, _update_losses=nothing,
    )  # fmt: skip
    Schedule1F1B._step_microbatches(schedule)
    return stage.calls


def torch_actions(schedule: str, pp: int, chunks: int, micro_batches: int) -> list[list[tuple[int, str, int]]]:
    """What torch's schedule has every rank compute."""
    if schedule == "1f1b":
        return [one_f_one_b(rank, pp, micro_batches) for rank in range(pp)]
    fake = SimpleNamespace(
        n_local_stages=chunks, pp_group_size=pp, num_stages=pp * chunks, _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // max(1, micro_batches // pp),
    )  # fmt: skip
    return [
        [
            (action.stage_index, LETTERS[action.computation_type.name], action.microbatch_index)
            for action in TORCH[schedule]._calculate_single_rank_operations(fake, rank)
            if action is not None
        ]
        for rank in range(pp)
    ]


CASES = [
    ("1f1b", pp, 1, m) for pp in range(2, 9) for m in (pp, pp + 1, 2 * pp + 1, 24)
] + [
    (schedule, pp, chunks, m)
    for schedule, chunks in (("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("zero-bubble", 1), ("zero-bubble", 2))
    for pp in range(2, 7)
    for m in (1, pp - 1, pp, 2 * pp - 1, 2 * pp, 4 * pp)
] + [("zbv", pp, 2, m) for pp in range(2, 7) for m in (1, pp, 2 * pp - 1, 2 * pp, 5 * pp + 1)]  # fmt: skip


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), CASES)
def test_actions_are_torchs(schedule: str, pp: int, chunks: int, micro_batches: int) -> None:
    found = schedule_actions(schedule, pp, chunks, micro_batches)
    assert [list(map(tuple, rank)) for rank in found] == torch_actions(schedule, pp, chunks, micro_batches)


@pytest.mark.parametrize(("schedule", "pp", "chunks", "micro_batches"), CASES)
def test_every_pass_happens_once(schedule: str, pp: int, chunks: int, micro_batches: int) -> None:
    split = schedule in ("zero-bubble", "zbv")
    wanted = Counter(
        (stage, kind, m)
        for stage in range(pp * chunks)
        for kind in ("FIW" if split else "FB")
        for m in range(micro_batches)
    )
    assert Counter(tuple(a) for rank in schedule_actions(schedule, pp, chunks, micro_batches) for a in rank) == wanted


def test_one_rank_accumulates() -> None:
    assert [a.kind for a in schedule_actions("1f1b", 1, 1, 3)[0]] == ["F", "B"] * 3
    there_and_back = [(0, "F"), (1, "F"), (1, "B"), (0, "B")]
    assert [(a.stage, a.kind) for a in schedule_actions("zbv", 1, 2, 2)[0]] == there_and_back * 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("1f1b", 4, 1, 3), "needs at least as many micro-batches as stages"),
        (("zbv", 2, 1, 4), "takes 2 stages a rank"),
        (("interleaved-1f1b", 3, 2, 7), "2 rounds divide"),
        (("gpipe", 2, 1, 4), "must be one of 1f1b"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(arguments: tuple[str, int, int, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        schedule_actions(*arguments)
