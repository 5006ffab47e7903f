"""What the row-wise kernels share: how rows are laid out, and how many of them a program takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
from torch import Tensor


class Tile(NamedTuple):
    """Rows and columns of one program, powers of two, and its warps."""

    rows: int
    columns: int
    warps: int


def tile(columns: int, elements: int, most_columns: int = 1 << 16) -> Tile:
    """A tile of about `elements` with whole rows of up to `most_columns`; 512 elements a warp, up to 16 of them.

    It follows from the width alone: so do the bits of a row, whatever rows come with it.
    """
    width = min(triton.next_power_of_2(max(columns, 1)), most_columns)
    rows = max(1, elements // width)
    return Tile(rows, width, min(16, max(1, rows * width // 512)))


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [R, D] whose columns lie side by side; rows may be apart, or one and the same. May copy."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
