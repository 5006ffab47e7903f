"""Bringing tokens to their experts and back: an expert-sorted buffer whose groups start at aligned rows."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.precision import widen

_ALIGNMENT_16_BIT = 32
_FEW = 32


def row_alignment(dtype: torch.dtype) -> int:
    """Multiple of rows at which expert groups start.

    16-bit matmuls prepare code for each new shape: with free row counts nearly every expert call is a new shape
    (measured: bf16 on CPU 3x slower). Multiples of 32 leave few shapes, and grouped kernels on GPUs want 16 or more.
    float32 and float64 take any row count equally well, so there padding would only be work.
    """
    return _ALIGNMENT_16_BIT if dtype.itemsize == 2 else 1


class Permutation(NamedTuple):
    """Where assignments go. `source_R`: the token that fills each buffer row (padding rows repeat token 0);
    `row_TK`: the buffer row of each assignment; `offsets_E` int32: the end row of each expert's group."""

    source_R: Tensor
    row_TK: Tensor
    offsets_E: Tensor


def expert_rows(offsets_E: Tensor) -> list[slice]:
    """The rows of each expert in an expert-sorted buffer; reads the end rows offsets_E [E] on the host."""
    ends = offsets_E.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def expert_permutation(
    experts_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, alignment: int = _ALIGNMENT_16_BIT
) -> Permutation:
    """Stable sort of assignments by expert into groups of `alignment` rows or multiples of it.

    experts_TK int64 [T, K]. Where `kept_TK` is false the assignment goes nowhere: its row is the last one, which is
    always padding. Row counts are exact on CPU; on other devices the buffer has its largest possible size, so that
    the host never waits. The last expert's group takes all remaining rows.
    """
    tokens, k = experts_TK.shape
    # The largest size: each group that has rows is filled up with alignment - 1 of them at most.
    rows = (tokens * k + min(tokens * k, num_experts) * (alignment - 1)) // alignment * alignment
    spare = alignment if kept_TK is not None and tokens else 0
    if use_triton(experts_TK):
        from moeforge.kernels.triton.permute import permute

        return Permutation(*permute(experts_TK, num_experts, kept_TK, alignment, rows + spare))
    if experts_TK.device.type == "cpu" and kept_TK is None and 0 < tokens * k <= _FEW:
        return _few(experts_TK, num_experts, alignment)
    experts_N = experts_TK.reshape(-1)
    if kept_TK is not None:
        experts_N = torch.where(kept_TK.reshape(-1), experts_N, num_experts)
    order_N = torch.argsort(experts_N, stable=True)
    # Not bincount: on GPUs it waits for its result's size.
    counts = experts_N.new_zeros(num_experts + 1).scatter_add_(0, experts_N, torch.ones_like(experts_N))[:-1]
    aligned = (counts + alignment - 1) // alignment * alignment
    ends = aligned.cumsum(0)
    if experts_TK.device.type == "cpu":
        rows = int(ends[-1])
    rows += spare  # none without tokens: there is no token 0 to fill it with
    # Shift from the dense sorted position to the aligned one, by expert; dropped assignments come last in the order.
    shift = (ends - aligned) - (counts.cumsum(0) - counts)
    sorted_experts = experts_N[order_N]
    row_sorted = torch.arange(tokens * k, device=experts_TK.device)
    if kept_TK is None:
        row_sorted = row_sorted + shift[sorted_experts]
    else:
        moved = row_sorted + shift[sorted_experts.clamp_max(num_experts - 1)]
        row_sorted = torch.where(sorted_experts < num_experts, moved, rows - 1)
    row_N = torch.empty_like(row_sorted).scatter_(0, order_N, row_sorted)
    source = torch.zeros(rows, dtype=torch.int64, device=experts_TK.device)
    source.scatter_(0, row_sorted, order_N // k)
    offsets = ends.to(torch.int32)
    offsets[-1] = rows
    return Permutation(source, row_N.view(tokens, k), offsets)


def _few(experts_TK: Tensor, num_experts: int, alignment: int) -> Permutation:
    """`expert_permutation` of a few assignments on the host: a dozen small tensor operations cost more there."""
    k = experts_TK.shape[1]
    chosen = experts_TK.flatten().tolist()
    counts = [0] * num_experts
    for expert in chosen:
        counts[expert] += 1
    ends = list(accumulate(-(-count // alignment) * alignment for count in counts))
    free = [0, *ends[:-1]]
    source, rows = [0] * ends[-1], [0] * len(chosen)
    for n, expert in enumerate(chosen):
        rows[n] = free[expert]
        source[free[expert]] = n // k
        free[expert] += 1
    return Permutation(
        torch.tensor(source), torch.tensor(rows).view_as(experts_TK), torch.tensor(ends, dtype=torch.int32)
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        # Reading each token's K rows is deterministic and needs no atomic adds. Padding rows get no gradient
        # because `combine` gives them none.
        if use_triton(grads[0]):
            from moeforge.kernels.triton import permute

            return permute.combine(grads[0], None, row), None, None
        out = grads[0].index_select(0, row[:, 0])
        for k in range(1, row.shape[1]):
            out += grads[0].index_select(0, row[:, k])
        return out, None, None


def gather(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """The expert-sorted buffer [R, D] of token rows x_TD."""
    if not torch.is_grad_enabled():
        return x_TD.index_select(0, permutation.source_R)
    return _Gather.apply(x_TD, permutation.source_R, permutation.row_TK)


def _combined(y: Tensor, weights: Tensor, row: Tensor) -> Tensor:
    if use_triton(y):
        from moeforge.kernels.triton import permute

        return permute.combine(y, weights, row)
    cast = weights.to(y.dtype)
    out = y.index_select(0, row[:, 0]).mul_(cast[:, :1])
    for k in range(1, row.shape[1]):
        out.addcmul_(y.index_select(0, row[:, k]), cast[:, k : k + 1])
    return out


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, row)
        return _combined(y, weights, row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights, row = ctx.saved_tensors
        grad = grads[0]
        if use_triton(y):
            from moeforge.kernels.triton import permute

            return *permute.combine_backward(grad, y, weights, row), None
        cast, wide = weights.to(y.dtype), widen(grad)
        grad_y = torch.zeros_like(y)
        grad_weights = torch.empty_like(weights)
        for k in range(row.shape[1]):
            grad_y.index_copy_(0, row[:, k], grad * cast[:, k : k + 1])
            # In float32: the router learns from the difference of such products, nearly equal while experts are.
            grad_weights[:, k] = (widen(y.index_select(0, row[:, k])) * wide).sum(1)
        return grad_y, grad_weights, None


def combine(y_RD: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Sum over k of weights_TK times the expert output of each assignment: [T, D] in y's dtype.

    Weights of dropped assignments must be zero (they all share the last, padding row).
    """
    if not torch.is_grad_enabled():
        return _combined(y_RD, weights_TK, permutation.row_TK)
    return _Combine.apply(y_RD, weights_TK, permutation.row_TK)
