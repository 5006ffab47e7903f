"""Rotary position embedding: a program turns some heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import tile


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, half, token_stride, head_stride,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    x_ptr += token * token_stride + head * head_stride + pair
    out_ptr += (token * heads + head) * 2 * half + pair
    a = tl.load(x_ptr, inside).to(tl.float32)
    b = tl.load(x_ptr + half, inside).to(tl.float32)
    cos = tl.load(cos_ptr + token * half + pair, pair < half).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + pair, pair < half).to(tl.float32)
    if BACKWARD:
        sin = -sin
    tl.store(out_ptr, a * cos - b * sin, inside)
    tl.store(out_ptr + half, b * cos + a * sin, inside)


def rotate(x_THh: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    """The pairs (i, i + h/2) of x turned by the angles whose cos and sin, [T, 1, h/2], are given; or turned back."""
    tokens, heads, h = x_THh.shape
    out = x_THh.new_empty(x_THh.shape)
    if out.numel():
        x = x_THh if x_THh.stride(2) == 1 else x_THh.contiguous()
        size = tile(h // 2, 2048)
        _rotate[(tokens, triton.cdiv(heads, size.rows))](
            x, cos.contiguous(), sin.contiguous(), out, heads, h // 2, x.stride(0), x.stride(1), backward, *size[:2],
            num_warps=size.warps,
        )  # fmt: skip
    return out
