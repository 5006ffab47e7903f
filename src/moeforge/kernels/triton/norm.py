"""RMSNorm: a program has whole rows in registers, statistics in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import as_rows, tile

_PROGRAMS = 512
"""Of a backward, at most: each keeps a sum of the weight's gradient."""


@triton.jit
def _forward(
    x_ptr, weight_ptr, out_ptr, rstd_ptr, rows, columns, x_stride, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / columns + eps)
    weight = tl.load(weight_ptr + column, column < columns, other=0.0).to(tl.float32)
    unit = (x * rstd[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)  # rounded where Llama does
    tl.store(out_ptr + row[:, None] * columns + column[None, :], unit * weight[None, :], inside)
    tl.store(rstd_ptr + row, rstd, row < rows)


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, rows, columns, grad_stride, x_stride, rows_each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * rows_each
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, column < columns, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, tl.minimum(begin + rows_each, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)[:, None]
        unit = x * rstd
        weight_grad += tl.sum(grad * unit, 0)
        grad = grad * weight[None, :]
        mean = tl.sum(grad * unit, 1) / columns
        grad_x = (grad - unit * mean[:, None]) * rstd
        tl.store(grad_x_ptr + row[:, None] * columns + column[None, :], grad_x, inside)
    tl.store(partial_ptr + tl.program_id(0) * columns + column, weight_grad, column < columns)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x [..., D], and what each row was multiplied with, float32 [R]."""
    out = x.new_empty(x.shape)
    rows = as_rows(x)
    rstd = x.new_empty(len(rows), dtype=torch.float32)
    if x.numel():
        size = tile(x.shape[-1], 4096)
        grid = (triton.cdiv(len(rows), size.rows),)
        _forward[grid](
            rows, weight.contiguous(), out, rstd, *rows.shape, rows.stride(0), eps, *size[:2], num_warps=size.warps
        )
    return out, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight. The latter is deterministic: sums of fixed rows, then the sum of those."""
    grad_x = x.new_empty(x.shape)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    grads, rows = as_rows(grad), as_rows(x)
    size = tile(x.shape[-1], 4096)
    rows_each = triton.cdiv(len(rows), size.rows * _PROGRAMS) * size.rows
    programs = triton.cdiv(len(rows), rows_each)
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    _backward[(programs,)](
        grads, rows, weight.contiguous(), rstd, grad_x, partial, *rows.shape, grads.stride(0), rows.stride(0),
        rows_each, *size[:2], num_warps=size.warps,
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)
