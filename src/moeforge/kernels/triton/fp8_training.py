"""Rounding of stacks and of their transposes to e4m3 with a scale for each row, as training wants it in every step.

Whole rows stay in registers between their maximum and the division by it. A transpose is read twice, in the order in
which the stack lies in memory: first for the maximum of each column, then tile by tile, turned on the way out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.fp8 import E4M3, e4m3_scale
from moeforge.kernels.triton import fp8_convert
from moeforge.kernels.triton.fp8_convert import as_argument, to_e4m3_bytes

_WIDEST = 1 << 14
"""Columns that one program has in its registers."""
_ELEMENTS = 4096
_MAXIMA = {"ROWS": 32, "COLUMNS": 128, "LOOPS": 16}
_TILE = {"ROWS": 128, "COLUMNS": 64}


@triton.jit
def _magnitude(x):
    """Magnitudes as integers, which are in the same order; NaN is the largest: tl.max would lose it."""
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _scale(largest):
    """`e4m3_scale` of a magnitude."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    return tl.where(scale < 1.1754943508222875e-38, 1.0, scale)


@triton.jit
def _rounded(x, scale, dtype: tl.constexpr):
    """x / scale as e4m3, or as its bytes where `dtype` is uint8; scale is a row or a column."""
    x = x.to(tl.float32)
    if dtype == tl.uint8:
        return to_e4m3_bytes(tl.div_rn(x, scale))
    else:
        return _quotient(x, scale).to(dtype)


@triton.jit
def _quotient(x, scale):
    """tl.div_rn, as far as e4m3 tells, where scale is that of x's row: in a third of the instructions, of which there
    would be more than memory leaves time for.

    By Markstein's theorem (Handbook of Floating-Point Arithmetic, section 4.7) a quotient less than one unit in its
    last place off comes right by one step with its exact remainder and the rounded inverse; the first step brings
    x * inverse there. A divisor from 1 to 2 keeps remainders exact, of quotients that are not 0 in e4m3. With the
    signs as they are here, -0 stays -0.
    """
    exponent = tl.minimum(scale.to(tl.int32, bitcast=True) >> 23, 250)
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    divisor = scale * power
    inverse = tl.broadcast_to(tl.div_rn(-1.0, divisor), x.shape)
    divisor = tl.where(divisor == float("inf"), 0.0, divisor)  # finite / inf is 0, without a remainder of 0 * inf
    divisor = tl.broadcast_to(divisor, x.shape)
    negative = x * (power * -1.0)
    quotient = negative * inverse
    quotient = tl.fma(tl.fma(quotient, divisor, negative), inverse, quotient)
    return tl.fma(tl.fma(quotient, divisor, negative), inverse, quotient)


@triton.jit
def _rows(
    x_ptr, values_ptr, scales_ptr, rows, columns, x_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program has ROWS whole rows: their first COLUMNS numbers and the REST, both powers of two, REST or 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x_ptr += row * x_stride
    values_ptr += row * columns
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + column, inside, other=0.0)
    largest = tl.max(_magnitude(x), 1, keep_dims=True)
    if REST:
        rest = COLUMNS + tl.arange(0, REST)[None, :]
        rest_inside = (row < rows) & (rest < columns)
        x_rest = tl.load(x_ptr + rest, rest_inside, other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(x_rest), 1, keep_dims=True))
    scale = _scale(largest)
    tl.store(scales_ptr + row, scale, row < rows)
    tl.store(values_ptr + column, _rounded(x, scale, values_ptr.dtype.element_ty), inside)
    if REST:
        tl.store(values_ptr + rest, _rounded(x_rest, scale, values_ptr.dtype.element_ty), rest_inside)


@triton.jit
def _column_maxima(
    x_ptr, largest_ptr, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """A program has COLUMNS columns of ROWS * LOOPS rows of a matrix; maxima know no order, so atomics are exact."""
    first_column, matrix = tl.program_id(0) * COLUMNS, tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(1).to(tl.int64) * (ROWS * LOOPS)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)
    inside = column < columns - first_column
    x_ptr += (matrix * rows + first_row) * columns + first_column
    largest = tl.zeros([ROWS, COLUMNS], tl.int32)
    for _ in range(LOOPS):
        x = tl.load(x_ptr + row * columns + column[None, :], (row < rows - first_row) & inside[None, :], other=0.0)
        largest = tl.maximum(largest, _magnitude(x))
        first_row += ROWS
        x_ptr += ROWS * columns
    largest_ptr += matrix * columns + first_column
    tl.atomic_max(largest_ptr + column, tl.max(largest, 0), inside, sem="relaxed")


@triton.jit
def _transposed(x_ptr, scales_ptr, values_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program has a tile of ROWS x COLUMNS of a matrix [rows, columns], and writes it as COLUMNS x ROWS."""
    first_column, matrix = tl.program_id(0).to(tl.int64) * COLUMNS, tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(1).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows - first_row, column < columns - first_column
    x_ptr += (matrix * rows + first_row) * columns + first_column
    inside = row_inside[:, None] & column_inside[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], inside, other=0.0)
    scale = tl.load(scales_ptr + matrix * columns + first_column + column, column_inside, other=1.0)
    values_ptr += (matrix * columns + first_column) * rows + first_row
    rounded = _rounded(tl.trans(x), scale[:, None], values_ptr.dtype.element_ty)
    tl.store(values_ptr + column[:, None] * rows + row[None, :], rounded, column_inside[:, None] & row_inside[None, :])


def quantize_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """`moeforge.kernels.fp8_weight.quantize_activations` of x, with a scale for each row: the same bits.

    Values [R, K], contiguous, and scales [R, 1]; rows of x may be apart. Where columns are, or where there are more
    than registers hold, `fp8_convert.quantize_activations` reads twice.
    """
    rows, columns = x_RK.shape
    if columns > _WIDEST or x_RK.stride(1) != 1:
        return fp8_convert.quantize_activations(x_RK)
    values = torch.empty(x_RK.shape, dtype=E4M3, device=x_RK.device)
    scales = x_RK.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        first, rest = _pieces(columns)
        together = max(1, _ELEMENTS // triton.next_power_of_2(first + rest))
        warps = min(16, max(1, triton.next_power_of_2(together * (first + rest) // 1024 + 1) // 2))
        _rows[(triton.cdiv(rows, together),)](
            x_RK, as_argument(values), scales, rows, columns, x_RK.stride(0), together, first, rest, num_warps=warps
        )
    return values, scales


def quantize_transposed(x_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_activations` of each x^T: values [E, K, N], contiguous, and scales [E, K, 1]: the same bits.

    x [E, N, K], contiguous.
    """
    matrices, rows, columns = x_ENK.shape
    values = torch.empty(matrices, columns, rows, dtype=E4M3, device=x_ENK.device)
    largest = x_ENK.new_zeros(matrices, columns, 1, dtype=torch.int32)
    if x_ENK.numel():
        part = _MAXIMA["ROWS"] * _MAXIMA["LOOPS"]
        grid = triton.cdiv(columns, _MAXIMA["COLUMNS"]), triton.cdiv(rows, part), matrices
        _column_maxima[grid](x_ENK, largest, rows, columns, **_MAXIMA, num_warps=4)
    scales = e4m3_scale(largest.view(torch.float32))
    if x_ENK.numel():
        grid = triton.cdiv(columns, _TILE["COLUMNS"]), triton.cdiv(rows, _TILE["ROWS"]), matrices
        _transposed[grid](x_ENK, scales, as_argument(values), rows, columns, **_TILE, num_warps=8)
    return values, scales


def quantize_weights(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Values [E, N, K], contiguous, and scales [E, N, 1] of a stack that is contiguous or the transpose of such a one:
    others are copied."""
    if not weight_ENK.is_contiguous() and weight_ENK.transpose(1, 2).is_contiguous():
        return quantize_transposed(weight_ENK.transpose(1, 2))
    values, scales = quantize_rows(weight_ENK.contiguous().flatten(0, 1))
    return values.view(weight_ENK.shape), scales.view(*weight_ENK.shape[:2], 1)


def _pieces(columns: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that hold that many columns with few lanes idle: 4608 = 4096 + 512."""
    width = triton.next_power_of_2(max(columns, 2))
    rest = triton.next_power_of_2(max(columns - width // 2, 1))
    return (width, 0) if 2 * rest == width else (width // 2, rest)
