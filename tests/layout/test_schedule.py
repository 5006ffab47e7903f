"""The rules of schedules, against the schedules of torch."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moeforge.errors import UserError
from moeforge.layout import SCHEDULES, require_schedule

TORCH: dict[str, Any] = {
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def torch_builds(schedule: str, stages: int, pp: int, micro_batches: int) -> bool:
    def stage(index: int) -> Any:
        return SimpleNamespace(
            stage_index=index, num_stages=stages, group_size=pp, group_rank=0, submod=nn.Identity(), has_backward=True
        )

    own = [stage(index) for index in ((0, stages - 1) if schedule == "zbv" else range(0, stages, pp))]
    try:
        if schedule == "1f1b":
            Schedule1F1B(own[0], micro_batches, loss_fn=lambda *_: None)
        else:
            TORCH[schedule](own, micro_batches, loss_fn=lambda *_: None)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2)],
)
def test_micro_batches_are_refused_where_torch_refuses_them(schedule, chunks):
    for pp in range(2, 6):
        for micro_batches in range(1, 14):
            try:
                require_schedule(schedule, pp * chunks, pp, micro_batches)
                fits = True
            except UserError as error:
                assert f'parallel.schedule = "{schedule}": needs ' in str(error) and "\n" not in str(error)
                assert str(micro_batches) in str(error)
                fits = False
            assert fits == torch_builds(schedule, pp * chunks, pp, micro_batches), (pp, micro_batches)


@pytest.mark.parametrize(
    ("schedule", "stages", "allowed"),
    [
        ("1f1b", 8, "1"),
        ("interleaved-1f1b", 4, "2 or more"),
        ("zero-bubble", 2, "1 or more"),
        ("zbv", 4, "2"),
        ("zbv", 12, "2"),
    ],
)
def test_stages_a_rank(schedule, stages, allowed):
    with pytest.raises(
        UserError, match=f'parallel.schedule = "{schedule}": takes {allowed}.* are {stages} stages on 4'
    ):
        require_schedule(schedule, stages, 4)


def test_one_pipeline_rank_runs_any_number_of_micro_batches():
    for schedule, (chunks, _) in SCHEDULES.items():
        require_schedule(schedule, chunks, 1, 1)


def test_unknown_schedules_are_refused():
    with pytest.raises(UserError, match='"gpipe": must be one of 1f1b, interleaved-1f1b, zero-bubble, zbv'):
        require_schedule("gpipe", 2, 2)
