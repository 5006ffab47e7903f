"""The router's linear map of 16-bit activations and weights to float32 logits, and its gradients, without wide copies.

Products of 16-bit numbers are exact in float32. Gradients of logits are not 16-bit: there each operand goes to the
tensor cores as two TF32 parts ("tf32x3"), of which a 16-bit number fills only the first. That leaves 2^-22 of a
gradient's size, far below what rounding to 16 bits does to the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import as_rows

STAGES = 4
"""Steps of a sum that are under way at once."""
_PARTS = 16
"""Of the tokens: each makes a sum of the weight's gradient of its own."""
_GRAD_X = (64, 16, 128)
"""Tokens, experts at a time and columns of a program."""


def step(tokens: int, experts: int) -> int:
    """Columns that a program of so many tokens and experts, powers of two, sums at a time: 32 KB of operands at most,
    so that three such steps fit sm_86 (99 KB)."""
    return 1 << (16384 // (tokens + experts)).bit_length() - 1


@triton.jit
def logits(
    x_ptr, weight_ptr, bias_ptr, token, expert, tokens, columns, stride,
    E: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """x W^T + b in float32 of some tokens and experts, [TOKENS, EXPERTS].

    With GROUPS, the number of warps, each warp sums a part of the columns: so many times shorter chains of dependent
    instructions, which is what few tokens wait for.
    """
    if GROUPS == 1:
        along = tl.arange(0, COLUMNS)[None, :]
        down = tl.arange(0, COLUMNS)[:, None]
        row, output = token[:, None], expert[None, :]
        z = tl.zeros((token.shape[0], expert.shape[0]), tl.float32)
    else:
        each: tl.constexpr = COLUMNS // GROUPS
        column = tl.arange(0, GROUPS)[:, None] * each + tl.arange(0, each)[None, :]
        along, down = column[:, None, :], column[:, :, None]
        row, output = token[None, :, None], expert[None, None, :]
        z = tl.zeros((GROUPS, token.shape[0], expert.shape[0]), tl.float32)
    for first in range(0, columns, COLUMNS):
        x = tl.load(x_ptr + row * stride + (first + along), (row < tokens) & (first + along < columns), other=0.0)
        inside = (output < E) & (first + down < columns)
        z = tl.dot(x, tl.load(weight_ptr + output * columns + (first + down), inside, other=0.0), z)
    if GROUPS > 1:
        z = tl.sum(z, 0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + expert, expert < E, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, columns, stride,
    E: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    z = logits(x_ptr, weight_ptr, bias_ptr, token, expert, tokens, columns, stride, E, COLUMNS, 1)
    tl.store(out_ptr + token[:, None] * E + expert[None, :], z, (token < tokens)[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _backward_x(
    grad_ptr, weight_ptr, out_ptr, tokens, columns, stride,
    E: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        inside = (token < tokens) & (expert < E)[None, :]
        grad = tl.load(grad_ptr + token * stride + expert[None, :], inside, other=0.0)
        inside = (expert < E)[:, None] & (column < columns)
        weight = tl.load(weight_ptr + expert[:, None] * columns + column, inside, other=0.0).to(tl.float32)
        total = tl.dot(grad, weight, total, input_precision="tf32x3")
    tl.store(out_ptr + token * columns + column, total, (token < tokens) & (column < columns))


@triton.jit(do_not_specialize=["tokens", "tokens_each"])
def _backward_weight(
    grad_ptr, x_ptr, partial_ptr, tokens, tokens_each, columns, grad_stride, stride,
    E: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    begin = tl.program_id(2).to(tl.int64) * tokens_each
    total = tl.zeros((EXPERTS, COLUMNS), tl.float32)
    for first in range(begin, tl.minimum(begin + tokens_each, tokens), TOKENS):
        token = (first + tl.arange(0, TOKENS))[:, None]
        inside = (token < tokens) & (expert < E)[None, :]
        grad = tl.load(grad_ptr + token * grad_stride + expert[None, :], inside, other=0.0)
        x = tl.load(x_ptr + token * stride + column, (token < tokens) & (column < columns), other=0.0)
        total = tl.dot(tl.trans(grad), x.to(tl.float32), total, input_precision="tf32x3")
    row = tl.program_id(2).to(tl.int64) * E + expert[:, None]
    tl.store(partial_ptr + row * columns + column, total, (expert < E)[:, None] & (column < columns))


def router_logits_forward(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """x W^T + b, float32 [T, E], summed in float32; x and W of one 16-bit type."""
    x, (experts, columns) = as_rows(x_TD), weight_ED.shape
    out = x.new_empty(len(x), experts, dtype=torch.float32)
    size, width = forward_tile(experts)
    _forward[(triton.cdiv(experts, width), triton.cdiv(len(x), size))](
        x, weight_ED.contiguous(), bias_E, out, len(x), columns, x.stride(0),
        experts, size, width, step(size, width), num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return out


def router_logits_grad_x(grad_TE: Tensor, weight_ED: Tensor) -> Tensor:
    """The gradient [T, D] of x, in the weight's type, for that of the logits, float32."""
    grad, (experts, columns) = as_rows(grad_TE), weight_ED.shape
    out = weight_ED.new_empty(len(grad), columns)
    size, _, across = _GRAD_X
    _backward_x[(triton.cdiv(columns, across), triton.cdiv(len(grad), size))](
        grad, weight_ED.contiguous(), out, len(grad), columns, grad.stride(0),
        experts, *_GRAD_X, num_warps=4,
    )  # fmt: skip
    return out


def router_logits_grad_weight(grad_TE: Tensor, x_TD: Tensor) -> Tensor:
    """The gradient [E, D] of the weight, in x's type. Deterministic: sums of fixed tokens, then the sum of those."""
    grad, x = as_rows(grad_TE), as_rows(x_TD)
    (tokens, experts), columns = grad.shape, x.shape[1]
    size, width, across = grad_weight_tile(experts)
    tokens_each = max(1, triton.cdiv(tokens, size * _PARTS)) * size
    parts = triton.cdiv(tokens, tokens_each)
    partial = grad.new_empty(parts, experts, columns)
    _backward_weight[(triton.cdiv(experts, width), triton.cdiv(columns, across), parts)](
        grad, x, partial, tokens, tokens_each, columns, grad.stride(0), x.stride(0),
        experts, size, width, across, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)


def forward_tile(experts: int) -> tuple[int, int]:
    """Tokens and experts of a program: of more experts, more tokens share the weights."""
    width = _width(experts, 128)
    return (32 if width <= 32 else 64), width


def grad_weight_tile(experts: int) -> tuple[int, int, int]:
    """Tokens at a time, experts and columns of a program: what 128 registers hold with both parts of each operand."""
    width = _width(experts, 64)
    return 32, width, 128 if width == 16 else 64


def _width(experts: int, most: int) -> int:
    """Experts of a program: a power of two that tensor cores take."""
    return max(16, min(most, triton.next_power_of_2(experts)))
