"""From the fused projection to rotated queries and keys, and values, and back: one pass each."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import tile


@triton.jit
def _split(
    fused_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, groups, half,
    PER_GROUP: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    group, which = head // (PER_GROUP + 2), head % (PER_GROUP + 2)
    inside = (group < groups) & (pair < half)
    fused = fused_ptr + (token * groups * (PER_GROUP + 2) + head) * 2 * half + pair
    group += token * groups
    key_or_value = tl.where(which == PER_GROUP, k_ptr, v_ptr) + group * 2 * half
    part = tl.where(which < PER_GROUP, q_ptr + (group * PER_GROUP + which) * 2 * half, key_or_value) + pair
    source, target = (part, fused) if BACKWARD else (fused, part)

    a = tl.load(source, inside).to(tl.float32)
    b = tl.load(source + half, inside).to(tl.float32)
    cos = tl.load(cos_ptr + token * half + pair, pair < half).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + pair, pair < half).to(tl.float32)
    if BACKWARD:
        sin = -sin
    turns = which <= PER_GROUP
    tl.store(target, tl.where(turns, a * cos - b * sin, a), inside)
    tl.store(target + half, tl.where(turns, b * cos + a * sin, b), inside)


def _launch(backward: bool, fused: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, groups, heads, h = fused.shape
    if fused.numel():
        size = tile(h // 2, 2048)
        _split[(tokens, triton.cdiv(groups * heads, size.rows))](
            fused, q, k, v, cos.contiguous(), sin.contiguous(), groups, h // 2, heads - 2, backward, *size[:2],
            num_warps=size.warps,
        )  # fmt: skip


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = tokens, groups, heads, h = fused.shape
        q, k, v = (fused.new_empty(tokens, groups * each, h) for each in (heads - 2, 1, 1))
        _launch(False, fused.contiguous(), q, k, v, cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        fused = grads[0].new_empty(ctx.shape)
        _launch(True, fused, *(grad.contiguous() for grad in grads), *ctx.saved_tensors)
        return fused, None, None


def split_rotated_qkv(qkv_TGxh: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`moeforge.kernels.split_rotated_qkv`; cos and sin [T, 1, h/2]."""
    q, k, v = _SplitRotated.apply(qkv_TGxh, cos, sin)
    return q, k, v
