"""The weight gradient of a matmul over an expert-sorted buffer, in Triton: grad^T x of each expert's rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton import configs
from moeforge.kernels.triton.configs import Config


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
