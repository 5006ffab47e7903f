"""SwiGLU and its gradient, each in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import as_rows, tile

_ELEMENTS, _COLUMNS = 2048, 1024


@triton.jit
def gated(gate, up):
    """silu(gate) * up in float32."""
    gate = gate.to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(tl.float32)


@triton.jit
def _forward(h_ptr, out_ptr, rows, columns, h_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    h_ptr += row * h_stride + column
    gate, up = tl.load(h_ptr, inside), tl.load(h_ptr + columns, inside)
    tl.store(out_ptr + row * columns + column, gated(gate, up), inside)


@triton.jit
def _backward(
    h_ptr, grad_ptr, out_ptr, grad_h_ptr, rows, columns, h_stride, grad_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    h_ptr += row * h_stride + column
    grad_h_ptr += row * 2 * columns + column
    gate = tl.load(h_ptr, inside).to(tl.float32)
    up = tl.load(h_ptr + columns, inside).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + column, inside).to(tl.float32)
    share = tl.sigmoid(gate)
    activation = gate * share
    tl.store(out_ptr + row * columns + column, activation * up, inside)
    tl.store(grad_h_ptr, grad * up * share * (1 + gate * (1 - share)), inside)
    tl.store(grad_h_ptr + columns, grad * activation, inside)


def swiglu_forward(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:]; h [..., 2F]."""
    out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    if out.numel():
        rows, size = as_rows(h), tile(out.shape[-1], _ELEMENTS, _COLUMNS)
        grid = triton.cdiv(len(rows), size.rows), triton.cdiv(out.shape[-1], size.columns)
        _forward[grid](rows, out, len(rows), out.shape[-1], rows.stride(0), *size[:2], num_warps=size.warps)
    return out


def swiglu_backward(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_forward` of h again, and its gradient [..., 2F] for the output gradient [..., F]."""
    out, grad_h = h.new_empty(*h.shape[:-1], h.shape[-1] // 2), h.new_empty(h.shape)
    if out.numel():
        rows, grads, size = as_rows(h), as_rows(grad), tile(out.shape[-1], _ELEMENTS, _COLUMNS)
        grid = triton.cdiv(len(rows), size.rows), triton.cdiv(out.shape[-1], size.columns)
        _backward[grid](
            rows, grads, out, grad_h, len(rows), out.shape[-1], rows.stride(0), grads.stride(0), *size[:2],
            num_warps=size.warps,
        )  # fmt: skip
    return out, grad_h
