"""Weights in e4m3 with scales, as they lie in memory, and what is computed with them: the references.

One form holds the three kinds of scales that checkpoints know: one for the tensor, one for each output channel, one for
each block of 128 x 128. Scales of a tensor or a block are repeated for every 16 rows, so that matrices whose rows come
from several tensors (fused q/k/v, gate and up) and shards cut at any multiple of 16 rows need nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels.fp8 import e4m3_scale, from_e4m3, to_e4m3
from moeforge.kernels.permute import expert_rows
from moeforge.kernels.swiglu import swiglu

GROUP_ROWS = 16
"""Rows that share a scale in memory, except where every row has its own."""
BLOCK = 128
"""Columns that share a scale, counted from the global first column."""

Activations = Literal["none", "dynamic", "static"]
"""What multiplies the weights: inputs as they are, or in e4m3 with a scale a token, or with one fixed scale."""


@dataclass(frozen=True)
class Fp8Weight:
    """dequantised[r, c] = values[r, c] * scales[r // group_rows, s(c)], with s(c) = (c + column_offset) // BLOCK, or 0
    where there is one column of scales.

    values e4m3 [..., N, K], scales float32 [..., n, k]: n = N (every row its own) or N / GROUP_ROWS rounded up; k = 1,
    or as many blocks as the columns touch. `column_offset`: the global column of the first one, modulo BLOCK; only a
    shard that cuts K has one.
    """

    values: Tensor
    scales: Tensor
    column_offset: int = 0

    @property
    def group_rows(self) -> int:
        """Rows that share a scale: 1 or GROUP_ROWS."""
        return 1 if self.scales.shape[-2] == self.values.shape[-2] else GROUP_ROWS

    @property
    def block_offset(self) -> int | None:
        """`column_offset` where blocks of columns have scales, else None."""
        return self.column_offset if self.scales.shape[-1] > 1 else None

    def unbind(self) -> list[Fp8Weight]:
        """The matrices [N, K] of a stack [E, N, K]."""
        pairs = zip(self.values.unbind(), self.scales.unbind(), strict=True)
        return [Fp8Weight(values, scales, self.column_offset) for values, scales in pairs]


def dequantize(weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """The weight [..., N, K]: the products in float32, then rounded to `dtype`."""
    rows, columns = weight.values.shape[-2:]
    scales = weight.scales.repeat_interleave(weight.group_rows, -2)[..., :rows, :]
    return (from_e4m3(weight.values, torch.float32) * _by_column(scales, columns, weight.column_offset)).to(dtype)


def quantize_activations(
    x: Tensor, scale: Tensor | None = None, column_offset: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] as e4m3 values [..., K] and what they are to be multiplied by: `scale` (one number), or the largest
    magnitude / 448, 1 where all is zero, float32: of each row [..., 1] or, with `column_offset`, of each block of a row
    [..., k]. Blocks are those of a weight with that offset.

    Values beyond +-448 saturate; what shares a scale with NaN or infinities holds NaN.
    """
    x, columns, offset = x.float(), x.shape[-1], column_offset or 0
    if scale is None:
        if column_offset is None:
            blocks = F.pad(x, (0, 0 if columns else 1)).unsqueeze(-2)  # of no columns there is no maximum
        else:
            blocks = F.pad(x, (offset, -(offset + columns) % BLOCK)).unflatten(-1, (-1, BLOCK))
        scale = e4m3_scale(blocks.abs().amax(-1))
    return to_e4m3(x / _by_column(scale, columns, offset)), scale


def _by_column(scales: Tensor, columns: int, offset: int) -> Tensor:
    """Scales [..., k] of blocks, the first of which lacks `offset` columns, for each column; those of one block as they
    are."""
    if scales.dim() == 0 or scales.shape[-1] == 1:
        return scales
    return scales.repeat_interleave(BLOCK, -1)[..., offset : offset + columns]


def fp8_linear_reference(
    x_RK: Tensor,
    weight: Fp8Weight,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T [R, N] in x's dtype: the reference, computed in `dtype` (None: float32, or float64 for a float64 x).

    weight [N, K]; `input_scale` float32, one number, for static activations. The values of `activations` other than
    "none" replace x by what `quantize_activations` makes of it; dynamic scales are of blocks where the weight's are.
    """
    dtype = dtype or torch.promote_types(x_RK.dtype, torch.float32)
    matrix = dequantize(weight, dtype)
    if activations == "none":
        return F.linear(x_RK.to(dtype), matrix).to(x_RK.dtype)
    fixed = input_scale if activations == "static" else None
    values, scale = quantize_activations(x_RK, fixed, weight.block_offset)
    if scale.dim() == 0 or scale.shape[-1] == 1:
        return (F.linear(from_e4m3(values, dtype), matrix) * scale).to(x_RK.dtype)
    inputs = from_e4m3(values, dtype) * _by_column(scale, x_RK.shape[1], weight.column_offset)
    return F.linear(inputs.to(dtype), matrix).to(x_RK.dtype)


def fp8_expert_mlp_reference(
    x_RD: Tensor,
    w13: Fp8Weight,
    w2: Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scales: tuple[Tensor | None, Tensor | None] = (None, None),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`expert_mlp` over FP8 weights w13 [E, 2F, D] and w2 [E, D, F]: the reference, a loop over experts.

    `input_scales`: of the inputs of w13 and of w2, for static activations. `dtype` as in `fp8_linear_reference`.
    """
    outputs = [x_RD[:0]]  # there may be no experts
    for rows, up, down in zip(expert_rows(offsets_E), w13.unbind(), w2.unbind(), strict=True):
        h = swiglu(fp8_linear_reference(x_RD[rows], up, activations, input_scales[0], dtype))
        outputs.append(fp8_linear_reference(h, down, activations, input_scales[1], dtype))
    return torch.cat(outputs)
