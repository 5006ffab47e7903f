"""Scales of FP8 weights: as they lie on disk, one row of them for each row of the weight, and as they lie in memory."""

from __future__ import annotations

from torch import Tensor

from moeforge.checkpoint.source import Shape
from moeforge.config.quantization import Scales
from moeforge.errors import UserError
from moeforge.kernels.fp8_weight import BLOCK, GROUP_ROWS

WEIGHT_SCALE, INPUT_SCALE = ".weight_scale", ".input_scale"
"""What the canonical names of scales end with, in the place of the weight's `.weight`."""


def disk_shape(weight: Shape, scales: Scales) -> Shape:
    """Shape on disk of the scales of a weight [N, K]."""
    rows, columns = weight
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    return {"tensor": (), "channel": (rows, 1), "block128": blocks}[scales]


def input_shape(scales: Scales) -> Shape:
    """Shape on disk of the scale of a matrix's inputs: as compressed-tensors, or Skywork, has this one number."""
    return (1,) if scales == "channel" else ()


def check_scales(name: str, stored: Tensor) -> None:
    """Raise UserError naming the scales if one is NaN, infinite, 0 or negative."""
    wide = stored.float()
    if not (wide.isfinite() & (wide > 0)).all():
        raise UserError(
            f"{name}: the checkpoint holds NaN, infinite, zero or negative scales; only finite, positive "
            "scales can be used"
        )


def row_scales(stored: Tensor, rows: int, scales: Scales) -> Tensor:
    """Float32 [N, k], a row for each of the N of the weight: k = 1, or one column a block. From those on disk."""
    wide = stored.float()
    if scales == "block128":
        return wide.repeat_interleave(BLOCK, 0)[:rows]
    return wide.reshape(-1, 1).expand(rows, 1)


def memory_scales(by_row: Tensor, rows: int) -> Tensor:
    """Those of [..., N, k] that are kept where a module has `rows` rows of them: all N, or one in GROUP_ROWS."""
    return by_row if rows == by_row.shape[-2] else by_row[..., ::GROUP_ROWS, :]
