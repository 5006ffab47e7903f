"""RMSNorm in Llama's form: statistics in float32, cast back, then times the weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.backend import use_triton
from moeforge.kernels.precision import widen


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if use_triton(x):
            from moeforge.kernels.triton.norm import rms_norm_forward

            out, rstd = rms_norm_forward(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return out
        wide = widen(x)
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        rstd.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        if use_triton(x):
            from moeforge.kernels.triton.norm import rms_norm_backward

            return *rms_norm_backward(grads[0], x, weight, rstd), None
        grad = widen(grads[0])
        unit = widen(x) * rstd
        d = x.shape[-1]
        grad_weight = (grad * unit).reshape(-1, d).sum(0).to(weight.dtype)
        grad = grad * widen(weight)
        mean = (grad * unit).sum(-1, keepdim=True).div_(d)
        return grad.sub_(unit.mul_(mean)).mul_(rstd).to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [..., D], weight [D] (Zhang & Sennrich 2019)."""
    if not torch.is_grad_enabled():  # an autograd function costs as much as what it does to a few rows
        if use_triton(x):
            from moeforge.kernels.triton.norm import rms_norm_forward

            return rms_norm_forward(x, weight, eps)[0]
        if native.takes(x, weight):
            return native.rms_norm(x, weight, eps)
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    return _RMSNorm.apply(x, weight, eps)
