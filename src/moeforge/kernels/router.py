"""The router's logits, float32 whatever the activations are (SKYWORK section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.linear import linear
from moeforge.kernels.precision import widen


class _RouterLogits(torch.autograd.Function):
    """Without wide copies of x and of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from moeforge.kernels.triton.router import router_logits_forward

        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return router_logits_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from moeforge.kernels.triton.router import router_logits_grad_weight, router_logits_grad_x

        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            router_logits_grad_x(grad, weight) if of_x else None,
            router_logits_grad_weight(grad, x) if of_weight else None,
            grad.sum(0).to(ctx.bias_dtype) if of_bias else None,
        )


def router_logits(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """x W^T + b [T, E] in float32 (float64 for float64), gradients in the types of what they are of.

    16-bit x and W of one type go to Triton where it is used; elsewhere, and where the types differ, wide copies are
    multiplied.
    """
    if use_triton(x_TD) and x_TD.dtype == weight_ED.dtype and x_TD.dtype.itemsize == 2:
        return _RouterLogits.apply(x_TD, weight_ED, bias_E)
    return linear(widen(x_TD), widen(weight_ED), None if bias_E is None else widen(bias_E))
