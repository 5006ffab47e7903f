"""Where assignments go in the expert-sorted buffer, and the weighted way back.

Two launches find the rows: the first counts each part's assignments to every expert, the second adds up the counts of
the parts before its own. Atomic adds would be one launch less and another order each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import as_rows, tile

_PARTS = 256
_ELEMENTS = 4096
"""Of an assignments by experts table in registers."""


@triton.jit
def _expert(expert_ptr, kept_ptr, n, assignments, NOWHERE: tl.constexpr):
    """Of assignments n; NOWHERE for those that are dropped or none."""
    expert = tl.load(expert_ptr + n, n < assignments, other=NOWHERE).to(tl.int32)
    if kept_ptr is not None:
        expert = tl.where(tl.load(kept_ptr + n, n < assignments, other=0) != 0, expert, NOWHERE)
    return expert


@triton.jit(do_not_specialize=["assignments", "rows", "each", "rows_each"])
def _count(
    expert_ptr, kept_ptr, count_ptr, source_ptr, assignments, rows, each, rows_each,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    begin = part * each
    count = tl.zeros((EXPERTS,), tl.int32)
    for first in range(begin, tl.minimum(begin + each, assignments), BLOCK):
        expert = _expert(expert_ptr, kept_ptr, first + tl.arange(0, BLOCK), assignments, EXPERTS)
        count += tl.sum((expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + part * EXPERTS + tl.arange(0, EXPERTS), count)
    # Padding rows repeat token 0; the others are written by the next launch.
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, rows)
    for first in range(begin, end, 1024):
        row = first + tl.arange(0, 1024)
        tl.store(source_ptr + row, tl.zeros((1024,), tl.int64), row < end)


@triton.jit(do_not_specialize=["assignments", "rows", "each", "parts"])
def _place(
    expert_ptr, kept_ptr, count_ptr, source_ptr, row_ptr, offset_ptr, assignments, rows, each, parts,
    E: tl.constexpr, K: tl.constexpr, ALIGNMENT: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, parts, BLOCK):
        other = first + tl.arange(0, BLOCK)[:, None]
        count = tl.load(count_ptr + other * EXPERTS + experts[None, :], other < parts, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(other < part, count, 0), 0)
    aligned = (total + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    end = tl.cumsum(aligned, 0)
    if part == 0:
        tl.store(offset_ptr + experts, tl.where(experts == E - 1, rows, end), experts < E)

    free = end - aligned + before
    begin = part * each
    for first in range(begin, tl.minimum(begin + each, assignments), BLOCK):
        n = first + tl.arange(0, BLOCK)
        expert = _expert(expert_ptr, kept_ptr, n, assignments, EXPERTS)
        one_hot = (expert[:, None] == experts[None, :]).to(tl.int32)
        rank = tl.cumsum(one_hot, 0) - one_hot
        row = tl.sum(one_hot * (free[None, :] + rank), 1)
        travels = expert < EXPERTS
        tl.store(row_ptr + n, tl.where(travels, row, rows - 1).to(tl.int64), n < assignments)
        tl.store(source_ptr + row, (n // K).to(tl.int64), travels)
        free += tl.sum(one_hot, 0)


@triton.jit
def _combine(y_ptr, weight_ptr, row_ptr, out_ptr, columns, stride, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token * K + k)
        y = tl.load(y_ptr + row * stride + column, column < columns, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        total += y
    tl.store(out_ptr + token * columns + column, total, column < columns)


@triton.jit
def _combine_backward(
    grad_ptr, y_ptr, weight_ptr, row_ptr, y_grad_ptr, weight_grad_ptr, columns, grad_stride, stride,
    K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    assignment = token * K + tl.program_id(1)
    row = tl.load(row_ptr + assignment)
    weight = tl.load(weight_ptr + assignment).to(tl.float32)
    product = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        grad = tl.load(grad_ptr + token * grad_stride + column, column < columns, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * stride + column, column < columns, other=0.0).to(tl.float32)
        tl.store(y_grad_ptr + row * columns + column, grad * weight, column < columns)
        product += grad * y
    tl.store(weight_grad_ptr + assignment, tl.sum(product, 0))


def permute(
    experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None, alignment: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `moeforge.kernels.Permutation`, of `rows` rows."""
    tokens, k = experts_TK.shape
    source = experts_TK.new_empty(rows, dtype=torch.int64)
    row_TK = experts_TK.new_empty(tokens, k, dtype=torch.int64)
    if not tokens:
        return source, row_TK, experts_TK.new_zeros(num_experts, dtype=torch.int32)
    offsets_E = experts_TK.new_empty(num_experts, dtype=torch.int32)
    assignments, width = tokens * k, triton.next_power_of_2(num_experts)
    block = max(1, _ELEMENTS // width)
    each = triton.cdiv(assignments, block * _PARTS) * block
    parts = triton.cdiv(assignments, each)
    counts = experts_TK.new_empty(parts, width, dtype=torch.int32)
    chosen, kept = experts_TK.contiguous(), None if kept_TK is None else kept_TK.contiguous()
    _count[(parts,)](
        chosen, kept, counts, source, assignments, rows, each, triton.cdiv(rows, parts), width, block, num_warps=4
    )
    _place[(parts,)](
        chosen, kept, counts, source, row_TK, offsets_E, assignments, rows, each, parts,
        num_experts, k, alignment, width, block, num_warps=4,
    )  # fmt: skip
    return source, row_TK, offsets_E


def combine(y_RD: Tensor, weights_TK: Tensor | None, row_TK: Tensor) -> Tensor:
    """Sum over k of the rows row_TK of y, times their weights where there are any: [T, D], summed in float32."""
    (tokens, k), columns = row_TK.shape, y_RD.shape[1]
    out = y_RD.new_empty(tokens, columns)
    if out.numel():
        y, size = as_rows(y_RD), tile(columns, 1, 1024)
        _combine[(tokens, triton.cdiv(columns, size.columns))](
            y, weights_TK if weights_TK is None else weights_TK.contiguous(), row_TK.contiguous(), out,
            columns, y.stride(0), k, size.columns, num_warps=size.warps,
        )  # fmt: skip
    return out


def combine_backward(grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, row_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y, zero in rows that no assignment has, and of the weights, summed in float32."""
    (tokens, k), columns = row_TK.shape, y_RD.shape[1]
    y_grad = y_RD.new_zeros(y_RD.shape)
    if not y_grad.numel() or not tokens:
        return y_grad, torch.zeros_like(weights_TK)
    weight_grad = weights_TK.new_empty(weights_TK.shape)
    grad, y, size = as_rows(grad_TD), as_rows(y_RD), tile(columns, 1, 1024)
    _combine_backward[(tokens, k)](
        grad, y, weights_TK.contiguous(), row_TK.contiguous(), y_grad, weight_grad,
        columns, grad.stride(0), y.stride(0), k, size.columns, num_warps=size.warps,
    )  # fmt: skip
    return y_grad, weight_grad
