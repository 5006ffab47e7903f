"""Matmuls of an expert-sorted buffer with each expert's weight, in Triton.

Weights are the left operand of every dot, y^T = W x^T: tensor cores take 16 rows or more there, but as few columns as a
decode step has tokens, and on sm_90 the left one may be converted from e4m3 in registers. A row of the result is summed
by one program, in an order that other rows do not change. The host never reads the offsets: a program finds its expert
among them, and the tiles that are too many, at most one for each expert, end at once.
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    n_tiles = tl.cdiv(2 * N if GATED else N, BLOCK_N)
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
    # With scales of blocks a tile of columns lies in one block, which is counted from the global first column.
    k = tl.arange(0, BLOCK_K)
    if BLOCK_SCALES:
        k -= column_offset
    r_inside, n_inside = r < end, n < N
    r_long, w_n_long, expert_long = r.to(tl.int64), w_n.to(tl.int64), tl.cast(expert, tl.int64)
    x_tile = x + r_long[None, :] * x_row + k[:, None] * x_column
    w_tile = w + expert_long * w_expert + w_n_long[:, None] * w_row + k[None, :] * w_column
    if w_scales is not None:
        w_scales += expert_long * w_scale_expert + w_n // GROUP_ROWS * w_scale_row

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(0, tl.cdiv(K + column_offset if BLOCK_SCALES else K, BLOCK_K)):
        k_inside = k < K
        if BLOCK_SCALES:
            k_inside &= k >= 0
        x_part = tl.load(x_tile, mask=k_inside[:, None] & r_inside[None, :], other=0.0)
        w_part = tl.load(w_tile, mask=n_inside[:, None] & k_inside[None, :], other=0.0)
        if not EIGHT_BITS:
            product = tl.dot(e4m3_to(w_part, x_part.dtype), x_part, input_precision="ieee")
        elif NATIVE:
            # On sm_90 sums of e4m3 products are only exact to 14 bits: no more than a block's go without float32.
            product = tl.dot(w_part, x_part, max_num_imprecise_acc=BLOCK_K)
        else:
            product = tl.dot(e4m3_to(w_part, tl.float16), e4m3_to(x_part, tl.float16))
        if BLOCK_SCALES:
            scale = block * BLOCK_K // _SCALE_COLUMNS
            product *= tl.load(w_scales + scale * w_scale_column, n_inside)[:, None]
            if X_BLOCK_SCALES:
                x_scale = x_scales + r_long * x_scale_row + scale * x_scale_column
                product *= tl.load(x_scale, mask=r_inside, other=0.0)[None, :]
        acc += product
        k += BLOCK_K
        x_tile += BLOCK_K * x_column
        w_tile += BLOCK_K * w_column

    if w_scales is not None and not BLOCK_SCALES:
        acc *= tl.load(w_scales, mask=n_inside, other=0.0)[:, None]
    if x_scales is not None:
        if not X_BLOCK_SCALES:
            acc *= tl.load(x_scales + r_long * x_scale_row, mask=r_inside, other=0.0)[None, :]
    result = acc.to(y.dtype.element_ty)
    if GATED:
        gate, up = tl.split(result.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
        result = gated(gate, up).to(y.dtype.element_ty).reshape(BLOCK_N // 2, BLOCK_M)
        n = within // group_size * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    out = y + r_long[None, :] * N + n[:, None]
    tl.store(out, result, mask=(n < N)[:, None] & r_inside[None, :])


@triton.jit
def weight_grad_kernel(
    grad,
    x,
    out,
    offsets,
    N,
    K,
    grad_row,
    grad_column,
    x_row,
    x_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    expert = tl.program_id(1)
    begin = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    k_tiles = tl.cdiv(K, BLOCK_N)
    n = tl.program_id(0) // k_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % k_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside, k_inside = n < N, k < K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        r_inside, r_long = r < end, r.to(tl.int64)
        grad_tile = grad + r_long[None, :] * grad_row + n[:, None] * grad_column
        x_tile = x + r_long[:, None] * x_row + k[None, :] * x_column
        grad_part = tl.load(grad_tile, mask=n_inside[:, None] & r_inside[None, :], other=0.0)
        x_part = tl.load(x_tile, mask=r_inside[:, None] & k_inside[None, :], other=0.0)
        acc += tl.dot(grad_part, x_part, input_precision="ieee")
    out += expert.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out, acc.to(out.dtype.element_ty), mask=n_inside[:, None] & k_inside[None, :])


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
    matmul_kernel[(row_tiles * triton.cdiv(w_rows, tile.block_n),)](
        x,
        w,
        y,
        offsets_E,
        x_scales,
        scales,
        rows,
        N,
        K,
        *x.stride(),
        *w.stride(),
        *(x_scales.stride() if x_scales is not None and x_scales.dim() else (0, 0)),
        *((0, 0, 0) if scales is None else scales.stride()),
        column_offset,
        EXPERTS=experts,
        PADDED=triton.next_power_of_2(experts),
        GROUP_ROWS=group_rows,
        BLOCK_SCALES=scales is not None and scales.shape[-1] > 1,
        X_BLOCK_SCALES=x_scales is not None and x_scales.dim() > 0 and x_scales.shape[1] > 1,
        EIGHT_BITS=kind == "w8a8",
        NATIVE=x.dtype == torch.float8_e4m3fn,
        GATED=gated,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=configs.BLOCK_K[kind],
        GROUP_M=tile.group_m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
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


def grouped_weight_grad(grad_RN: Tensor, x_RK: Tensor, offsets_E: Tensor, config: Config | None = None) -> Tensor:
    """As `moeforge.kernels.grouped.grouped_weight_grad`. An expert's rows are summed in their order."""
    N, K, experts = grad_RN.shape[1], x_RK.shape[1], offsets_E.shape[0]
    out = x_RK.new_empty(experts, N, K)
    if not out.numel():
        return out
    rows = configs.bucket(x_RK.shape[0], experts)
    tile = config or configs.config("weight-grad", rows, x_RK.device)
    tiles = triton.cdiv(N, tile.block_m) * triton.cdiv(K, tile.block_n)
    weight_grad_kernel[(tiles, experts)](
        grad_RN,
        x_RK,
        out,
        offsets_E,
        N,
        K,
        *grad_RN.stride(),
        *x_RK.stride(),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=configs.BLOCK_K["float32" if x_RK.dtype == torch.float32 else "16-bit"],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
