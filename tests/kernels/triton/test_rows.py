from __future__ import annotations

import pytest
import torch

from moeforge.kernels.triton.rows import as_rows, tile


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((128, 4096), (32, 128, 8)),
        ((4608, 4096), (1, 8192, 16)),
        ((1536, 2048, 1024), (2, 1024, 4)),
        ((1, 512), (512, 1, 1)),
        ((0, 1), (1, 1, 1)),
    ],
)
def test_a_tile_follows_from_the_width(arguments: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    assert tile(*arguments) == expected


def test_rows_are_views_where_they_can_be() -> None:
    wide = torch.arange(60).view(3, 4, 5)
    for x, copied in (
        (wide, False),
        (wide[:, :, 1:3], False),
        (wide[1:2, 1, :1].expand(4, 1), False),
        (wide[0, 0], False),
        (wide.transpose(1, 2), True),
        (wide[..., :1].expand(3, 4, 7), True),
    ):
        rows = as_rows(x)
        assert rows.stride(1) == 1 and torch.equal(rows.reshape(x.shape), x)
        assert (rows.data_ptr() != x.data_ptr()) == copied
    assert as_rows(torch.zeros(3, 0)).shape == (3, 0) and as_rows(torch.zeros(2, 0, 4)).shape == (0, 4)
