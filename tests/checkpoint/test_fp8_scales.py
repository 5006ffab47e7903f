from __future__ import annotations

from typing import get_args

import pytest
import torch

from moeforge.checkpoint.fp8_scales import disk_shape, input_shape, memory_scales, row_scales
from moeforge.config.quantization import Scales


@pytest.mark.parametrize("scales", get_args(Scales))
def test_every_row_gets_its_scales(scales: Scales) -> None:
    stored = torch.rand(disk_shape((300, 200), scales))
    assert stored.shape == {"tensor": (), "channel": (300, 1), "block128": (3, 2)}[scales]
    by_row = row_scales(stored.bfloat16(), 300, scales)
    assert by_row.dtype == torch.float32 and by_row.shape == (300, 2 if scales == "block128" else 1)
    for row in (0, 127, 128, 299):
        own = stored if scales == "tensor" else stored[row if scales == "channel" else row // 128]
        assert (by_row[row] == own.bfloat16().float()).all()
    assert input_shape(scales) in ((), (1,))


def test_one_row_in_sixteen_is_kept_where_all_sixteen_are_alike() -> None:
    by_row = torch.arange(5).repeat_interleave(16)[:70, None].expand(2, 70, 3)
    assert torch.equal(memory_scales(by_row, 5), torch.arange(5)[:, None].expand(2, 5, 3))
    assert memory_scales(by_row, 70) is by_row
