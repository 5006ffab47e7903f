"""Rotary position embedding, rotate-half form (Su et al. 2021, in Llama's layout)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton


def _turned(x: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    if use_triton(x) and cos.shape[:-1] == (x.shape[0], 1) and x.dim() == 3:
        from moeforge.kernels.triton.rope import rotate as rotate_on_gpu

        return rotate_on_gpu(x, cos, sin, backward)
    if backward:
        sin = -sin
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        # The cosine and sine may carry a length factor (yarn), so the transpose is the turn by the negative angle.
        return _turned(grad, cos, sin, backward=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + h/2) of the last dimension; x [T, ..., h], cos and sin broadcast to [T, ..., h/2]."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)
