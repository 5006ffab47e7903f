"""Matmuls of an expert-sorted buffer with each expert's weight, in Triton.

Weights are the left operand of every dot, y^T = W x^T: tensor cores take 16 rows or more there, but as few columns as a
decode step has tokens, and on sm_90 the left one may be converted from e4m3 in registers. A row of the result is summed
in an order that follows from the weight's shape: by one program, or, of FP8 weights with few rows, by several, whose
parts a second kernel adds up. The host never reads the offsets: a program finds its expert among them, and the tiles
that are too many, at most one for each expert, end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.fp8_weight import BLOCK, Activations, Fp8Weight
from moeforge.kernels.triton import configs
from moeforge.kernels.triton.configs import Config, Kind
from moeforge.kernels.triton.fp8_convert import as_argument, e4m3_to, quantize_activations, scaled_float16
from moeforge.kernels.triton.swiglu import gated

_SCALE_COLUMNS = tl.constexpr(BLOCK)
_APART_ROWS = 256
"""More rows have tiles enough for all multiprocessors, and larger parts to write and read."""
_ADDED_COLUMNS = 512


@triton.jit
def rows_of_tile(offsets, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; (any, 0, 0) of one that is too many."""
    e = tl.arange(0, PADDED)
    end = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_end <= tile).to(tl.int32), 0)
    chosen = e == expert
    first = tl.sum(tl.where(chosen, begin + (tile - tiles_end + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(chosen, end, 0), 0)


@triton.jit
def _part(
    x, w, x_scales, w_scales, K, x_column, x_scale_column, w_column, w_scale_column, column_offset,
    begin, end, r_inside, w_inside,
    BLOCK_SCALES: tl.constexpr, X_BLOCK_SCALES: tl.constexpr, EIGHT_BITS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W x^T over the blocks of columns from `begin` to `end`; x, w and scales point at their rows."""
    # With scales of blocks a tile of columns lies in one block, which is counted from the global first column.
    k = begin * BLOCK_K + tl.arange(0, BLOCK_K)
    if BLOCK_SCALES:
        k -= column_offset
    x_tile, w_tile = x[None, :] + k[:, None] * x_column, w[:, None] + k[None, :] * w_column
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(begin, end):
        k_inside = k < K
        if BLOCK_SCALES:
            k_inside &= k >= 0
        x_part = tl.load(x_tile, mask=k_inside[:, None] & r_inside[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=w_inside[:, None] & k_inside[None, :], other=0.0)
        if not EIGHT_BITS:
            product = tl.dot(e4m3_to(w_part, x_part.dtype), x_part, input_precision="ieee")
        elif NATIVE:
            # On sm_90 sums of e4m3 products are only exact to 14 bits: no more than a block's go without float32.
            product = tl.dot(w_part, x_part, max_num_imprecise_acc=BLOCK_K)
        else:
            product = tl.dot(e4m3_to(w_part, tl.float16), e4m3_to(x_part, tl.float16))
        if BLOCK_SCALES:
            scale = block * BLOCK_K // _SCALE_COLUMNS
            product *= tl.load(w_scales + scale * w_scale_column, w_inside)[:, None]
            if X_BLOCK_SCALES:
                product *= tl.load(x_scales + scale * x_scale_column, mask=r_inside, other=0.0)[None, :]
        acc += product
        k += BLOCK_K
        x_tile += BLOCK_K * x_column
        w_tile += BLOCK_K * w_column
    if w_scales is not None and not BLOCK_SCALES:
        acc *= tl.load(w_scales, mask=w_inside, other=0.0)[:, None]
    if x_scales is not None and not X_BLOCK_SCALES:
        acc *= tl.load(x_scales, mask=r_inside, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows"])  # or a decode step of a new size would wait for the compiler
def matmul_kernel(
    x,
    w,
    y,
    offsets,
    x_scales,
    w_scales,
    rows,
    N,
    K,
    x_row,
    x_column,
    w_expert,
    w_row,
    w_column,
    x_scale_row,
    x_scale_column,
    w_scale_expert,
    w_scale_row,
    w_scale_column,
    column_offset,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    X_BLOCK_SCALES: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y [R, N]; of a weight [E, 2 N, K] where GATED. Columns are summed in PARTS, and those in their order; where
    these are made APART, one a program, y is float32 [PARTS, R, rows of a weight] and not yet gated."""
    w_rows = 2 * N if GATED else N
    n_tiles = tl.cdiv(w_rows, BLOCK_N)
    # Programs that run together share weights: the same column tile for GROUP_M row tiles, then the next.
    group = tl.program_id(0) // (GROUP_M * n_tiles)
    group_size = tl.minimum(tl.num_programs(0) // n_tiles - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * n_tiles)
    tile = group * GROUP_M + within % group_size
    if offsets is None:
        expert, first, end = 0, tile * BLOCK_M, rows
    else:
        expert, first, end = rows_of_tile(offsets, tile, EXPERTS, PADDED, BLOCK_M)
        if first >= end:
            return

    r = first + tl.arange(0, BLOCK_M)
    n = within // group_size * BLOCK_N + tl.arange(0, BLOCK_N)
    w_n = n
    if GATED:
        # Eight rows of the gate, then those of up that they go with: tensor cores give both to one thread.
        n = n // 16 * 8 + n % 8
        w_n = n + w_n // 8 % 2 * N
    r_inside, w_inside = r < end, n < N
    r_long, w_n_long, expert_long = r.to(tl.int64), w_n.to(tl.int64), tl.cast(expert, tl.int64)
    x += r_long * x_row
    w += expert_long * w_expert + w_n_long * w_row
    if w_scales is not None:
        w_scales += expert_long * w_scale_expert + w_n // GROUP_ROWS * w_scale_row
    if x_scales is not None:
        x_scales += r_long * x_scale_row

    blocks = tl.cdiv(K + column_offset if BLOCK_SCALES else K, BLOCK_K)
    each = tl.cdiv(blocks, PARTS)
    part = tl.program_id(1) if APART else 0
    acc = _part(
        x, w, x_scales, w_scales, K, x_column, x_scale_column, w_column, w_scale_column, column_offset,
        part * each, tl.minimum(part * each + each, blocks), r_inside, w_inside,
        BLOCK_SCALES, X_BLOCK_SCALES, EIGHT_BITS, NATIVE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if APART:
        out = y + (part * tl.cast(rows, tl.int64) + r_long[None, :]) * w_rows + w_n[:, None]
        tl.store(out, acc, mask=w_inside[:, None] & r_inside[None, :])
        return
    for part in range(1, PARTS):
        acc += _part(
            x, w, x_scales, w_scales, K, x_column, x_scale_column, w_column, w_scale_column, column_offset,
            part * each, tl.minimum(part * each + each, blocks), r_inside, w_inside,
            BLOCK_SCALES, X_BLOCK_SCALES, EIGHT_BITS, NATIVE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    result = acc.to(y.dtype.element_ty)
    if GATED:
        gate, up = tl.split(result.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        result = gated(gate, up).to(y.dtype.element_ty).reshape(BLOCK_N // 2, BLOCK_M)
        n = within // group_size * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    out = y + r_long[None, :] * N + n[:, None]
    tl.store(out, result, mask=(n < N)[:, None] & r_inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_parts_kernel(parts, y, rows, N, PARTS: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """y [R, N] of parts [PARTS, R, N], or [PARTS, R, 2 N] where GATED."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = 2 * N if GATED else N
    parts += row * width + n
    result = _sum(parts, rows, width, n < N, PARTS).to(y.dtype.element_ty)
    if GATED:
        result = gated(result, _sum(parts + N, rows, width, n < N, PARTS).to(y.dtype.element_ty))
    tl.store(y + row * N + n, result, n < N)


@triton.jit
def _sum(parts, rows, width, inside, PARTS: tl.constexpr):
    total = tl.load(parts, inside)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * tl.cast(rows, tl.int64) * width, inside)
    return total


def matmul(
    x_RK: Tensor,
    weight_ENK: Tensor | Fp8Weight,
    offsets_E: Tensor | None,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
    config: Config | None = None,
    gated: bool = False,
) -> Tensor:
    """`grouped_matmul`; without offsets all rows belong to the one expert. `gated`: then `swiglu_forward`, in the same
    kernel and with the same bits."""
    rows, y_dtype = x_RK.shape[0], x_RK.dtype
    x, w, x_scales = x_RK, weight_ENK, None
    kind: Kind = "float32" if y_dtype == torch.float32 else "16-bit"
    scales, column_offset, group_rows = None, 0, 1
    if isinstance(w, Fp8Weight):
        kind = "weight-only" if kind == "16-bit" else kind
        scales, column_offset, group_rows = w.scales, w.column_offset, w.group_rows
        if activations != "none":
            kind = "w8a8"
            fixed = input_scale if activations == "static" else None
            values, x_scales = quantize_activations(x_RK, fixed, w.block_offset)
            x = as_argument(values)
        elif y_dtype == torch.bfloat16:
            x, x_scales = scaled_float16(x_RK)
        w = as_argument(w.values)
    experts, w_rows, K = w.shape
    N = w_rows // 2 if gated else w_rows
    y = x.new_empty(rows, N, dtype=y_dtype)
    if not y.numel():
        return y
    tile = config or configs.config(kind, configs.bucket(rows, experts), x.device)
    partial = 1 if offsets_E is None else min(experts, rows)
    row_tiles = (rows + partial * (tile.block_m - 1)) // tile.block_m
    in_blocks = scales is not None and scales.shape[-1] > 1
    # What multiplies a whole part may be contracted with the addition of the next one, or not: other bits.
    parts = configs.parts(w_rows, K) if in_blocks and kind != "float32" else 1
    apart = parts > 1 and rows <= _APART_ROWS
    out = y if not apart else y.new_empty(parts, rows, w_rows, dtype=torch.float32)
    matmul_kernel[(row_tiles * triton.cdiv(w_rows, tile.block_n), parts if apart else 1)](
        x,
        w,
        out,
        offsets_E,
        x_scales,
        scales,
        rows,
        N,
        K,
        *x.stride(),
        *w.stride(),
        *(x_scales.stride() if x_scales is not None and x_scales.numel() > 1 else (0, 0)),
        *((0, 0, 0) if scales is None else scales.stride()),
        column_offset,
        EXPERTS=experts,
        PADDED=triton.next_power_of_2(experts),
        GROUP_ROWS=group_rows,
        BLOCK_SCALES=in_blocks,
        X_BLOCK_SCALES=in_blocks and kind == "w8a8",
        EIGHT_BITS=kind == "w8a8",
        NATIVE=x.dtype == torch.float8_e4m3fn,
        GATED=gated,
        PARTS=parts,
        APART=apart,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=configs.BLOCK_K[kind],
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if apart:
        grid = rows, triton.cdiv(N, _ADDED_COLUMNS)
        add_parts_kernel[grid](out, y, rows, N, PARTS=parts, GATED=gated, COLUMNS=_ADDED_COLUMNS, num_warps=4)
    return y


def grouped_matmul(
    x_RK: Tensor,
    weight_ENK: Tensor | Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As `moeforge.kernels.grouped.grouped_matmul`, for any strides; float32 (never TF32), bfloat16 or float16."""
    return matmul(x_RK, weight_ENK, offsets_E, activations, input_scale, config)


def grouped_input_grad(grad_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor, config: Config | None = None) -> Tensor:
    """As `moeforge.kernels.grouped.grouped_input_grad`: the same kernel over the transposed weights."""
    return matmul(grad_RN, weight_ENK.transpose(1, 2), offsets_E, config=config)
