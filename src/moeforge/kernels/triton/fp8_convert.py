"""e4m3 in Triton. The type itself exists there from sm_89 on; elsewhere its bytes travel and integers convert them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_weight import BLOCK as SCALE_COLUMNS
from moeforge.kernels.triton.rows import tile

_BLOCK = 1024


def native(device: torch.device) -> bool:
    """Whether the device's own instructions convert and multiply e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def as_argument(values: Tensor) -> Tensor:
    """e4m3 values as a kernel takes them: as they are where the type is native, else their bytes."""
    return values if native(values.device) else values.view(torch.uint8)


@triton.jit
def e4m3_to(values, dtype: tl.constexpr):
    """Values or bytes of e4m3 in a wider dtype, exactly."""
    if values.dtype == tl.uint8:
        # In float16 the exponent has one bit more and a bias greater by 8: subnormals come right too.
        bits = ((values & 0x80).to(tl.uint16) << 8) | ((values & 0x7F).to(tl.uint16) << 7)
        wide = bits.to(tl.float16, bitcast=True) * 256.0
        wide = tl.where((values & 0x7F) == 0x7F, float("nan"), wide)
        return wide.to(dtype)
    else:
        return values.to(dtype)


@triton.jit
def to_e4m3_bytes(x):
    """float32 as bytes of e4m3: to the nearest, ties to even, beyond +-448 to +-448, NaN to NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    normal = magnitude.to(tl.uint32, bitcast=True)
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
    # 2^14 has 2^-9, the step of e4m3's subnormals, in its last place: the sum rounds to it.
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    x,
    values,
    scales,
    columns,
    x_row,
    x_column,
    offset,
    BLOCKS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a row or, with BLOCKS > 1, a block of a row; the first block lacks `offset` columns."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    begin, end = 0, columns
    if BLOCKS > 1:
        begin, end = block * BLOCK - offset, tl.minimum(columns, block * BLOCK - offset + BLOCK)
    x += row * x_row
    if DYNAMIC:
        # Magnitudes as integers are in the same order, and NaN is the largest: tl.max would lose it.
        largest = tl.zeros([BLOCK], tl.int32)
        for first in range(begin, end, BLOCK):
            column = first + lane
            inside = (column >= 0) & (column < end)
            part = tl.load(x + column * x_column, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(part).to(tl.int32, bitcast=True))
        scale = tl.div_rn(tl.max(largest, 0).to(tl.float32, bitcast=True), 448.0)
        scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
        tl.store(scales + row * BLOCKS + block, scale)
    else:
        scale = tl.load(scales)
    for first in range(begin, end, BLOCK):
        column = first + lane
        inside = (column >= 0) & (column < end)
        part = tl.load(x + column * x_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(values + row * columns + column, to_e4m3_bytes(tl.div_rn(part, scale)), mask=inside)


@triton.jit
def float16_kernel(x, values, scales, columns, x_row, x_column, BLOCK: tl.constexpr):
    """A program has a row."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x += row * x_row
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, columns, BLOCK):
        column = first + lane
        part = tl.load(x + column * x_column, mask=column < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part).to(tl.int32, bitcast=True))
    exponent = tl.maximum(tl.max(largest, 0) >> 23, 15)  # biased; both scales are normal numbers
    scale = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + row, scale)
    for first in range(0, columns, BLOCK):
        column = first + lane
        part = tl.load(x + column * x_column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(values + row * columns + column, (part * inverse).to(tl.float16), mask=column < columns)


def scaled_float16(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """x as float16 values [R, K] and the power of two [R, 1], float32, that they are to be multiplied by.

    The largest of a row comes to between 2^14 and 2^15 (less where it is below 2^-112): what float16 cannot hold of
    bfloat16 values is then at most 2^-39 of it. GPUs have an instruction from e4m3 to float16, and none to bfloat16.
    """
    rows, columns = x_RK.shape
    values = x_RK.new_empty(rows, columns, dtype=torch.float16)
    scales = x_RK.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        size = tile(columns, 1, 1 << 14)
        float16_kernel[(rows,)](x_RK, values, scales, columns, *x_RK.stride(), size.columns, num_warps=size.warps)
    return values, scales


def quantize_activations(
    x_RK: Tensor, scale: Tensor | None = None, column_offset: int | None = None
) -> tuple[Tensor, Tensor]:
    """`moeforge.kernels.fp8_weight.quantize_activations` in one kernel: the same bits."""
    rows, columns = x_RK.shape
    by_block = scale is None and column_offset is not None
    offset = column_offset if by_block and column_offset is not None else 0
    blocks = triton.cdiv(offset + columns, SCALE_COLUMNS) if by_block else 1
    values = x_RK.new_empty(rows, columns, dtype=torch.uint8)
    scales = x_RK.new_empty(rows, blocks, dtype=torch.float32) if scale is None else scale
    if rows and blocks:
        quantize_kernel[(rows, blocks)](
            x_RK,
            values,
            scales,
            columns,
            *x_RK.stride(),
            offset,
            BLOCKS=blocks,
            DYNAMIC=scale is None,
            BLOCK=SCALE_COLUMNS if blocks > 1 else _BLOCK,
            num_warps=1 if blocks > 1 else 4,
        )
    return values.view(E4M3), scales
