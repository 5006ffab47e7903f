"""SwiGLU (Shazeer 2020): silu(gate) * up over fused [gate, up] columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.backend import use_triton

_SERIAL = 32_767


def swiglu_forward(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:] without autograd; h [..., 2F]."""
    if use_triton(h):
        from moeforge.kernels.triton import swiglu as on_gpu

        return on_gpu.swiglu_forward(h)
    if native.takes(h):
        return native.swiglu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_forward` of h again, and its gradient [..., 2F] for the output gradient [..., F].

    Both need silu(gate), which is computed once; the halves of the result serve as scratch.
    """
    if use_triton(h):
        from moeforge.kernels.triton import swiglu as on_gpu

        return on_gpu.swiglu_backward(h, grad)
    if native.takes(h, grad):
        return native.swiglu_backward(h, grad)
    gate, up = h.chunk(2, dim=-1)
    out = torch.empty_like(h)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    activation = F.silu(gate)
    torch.mul(activation, grad, out=grad_up)
    torch.mul(grad, up, out=grad_gate)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return activation.mul_(up), out


def swiglu_invariant(h: Tensor) -> Tensor:
    """`swiglu_forward` whose bits in a row do not depend on the other rows.

    So it is on GPUs and in the native library. In torch on CPUs, elementwise loops of 32,768 elements and more are
    divided over threads anywhere, and the ends of a thread's part are computed by other instructions; so it goes in
    smaller parts there, of whole rows.
    """
    if use_triton(h) or native.takes(h):
        return swiglu_forward(h)
    return torch.cat([swiglu_forward(part) for part in h.split(max(1, _SERIAL // (h.shape[-1] // 2 or 1)))])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return swiglu_forward(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu_backward(ctx.saved_tensors[0], grads[0])[1]


def swiglu(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:]; only h [..., 2F] is kept for the backward."""
    return _SwiGLU.apply(h) if torch.is_grad_enabled() else swiglu_forward(h)
