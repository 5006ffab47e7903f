"""Cross-entropy of a linear head without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.kernels.precision import widen

# Rows of logits that exist at once: enough for efficient matmuls, 100 MB at a vocabulary of 49,152 in bf16.
_CHUNK = 1024
# Rows that are widened to float32 and normalised at once: what stays in a processor's cache.
_BLOCK = 64


def _softmax_minus_target(logits: Tensor, targets: Tensor, ignore: int, keep: bool) -> Tensor:
    """Sum of the losses of logits [R, V]; with `keep` the logits become their own gradients."""
    loss = torch.zeros((), dtype=widen(logits[:0]).dtype, device=logits.device)
    for block, target in zip(logits.split(_BLOCK), targets.split(_BLOCK), strict=True):
        wide = widen(block)
        valid = (target != ignore).to(wide.dtype).unsqueeze(1)
        index = target.clamp_min(0).unsqueeze(1)
        picked = wide.gather(1, index)
        highest = wide.amax(1, keepdim=True)
        wide = wide.sub_(highest).exp_() if keep else (wide - highest).exp_()
        total = wide.sum(1, keepdim=True)
        loss += ((highest + total.log() - picked) * valid).sum()
        if keep:
            wide.mul_(valid / total).scatter_add_(1, index, -valid)
            if wide.dtype != block.dtype:
                block.copy_(wide)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore: int) -> Tensor:
        loss = torch.zeros((), dtype=widen(x[:0]).dtype, device=x.device)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if wanted else None
        grad_weight = None
        for start in range(0, x.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = x[part] @ weight.t()
            loss += _softmax_minus_target(logits, targets[part], ignore, keep=wanted)
            if grad_x is None:
                continue
            # The gradients are made while the logits are at hand, and scaled by the incoming scalar later.
            torch.mm(logits, weight, out=grad_x[part])
            if grad_weight is None:
                grad_weight = logits.t() @ x[part]
            else:
                grad_weight.addmm_(logits.t(), x[part])
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # A scalar tensor does not widen the product, and stays in its own precision: 1 / tokens is no bf16 number.
        scale = grads[0]
        return grad_x * scale, None if grad_weight is None else grad_weight * scale, None, None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[target]; targets equal to `ignore` count nothing.

    Scalar in float32 (float64 for float64 inputs). The gradients are computed in the forward pass, chunk by
    chunk (Liger kernel's scheme), so that the logits [T, V] never exist as a whole.
    """
    if not torch.is_grad_enabled():
        # Inside the function this cannot be told: there, inputs count as differentiable also under no_grad.
        x_TD, weight_VD = x_TD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, ignore)
