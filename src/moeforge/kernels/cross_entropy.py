"""Cross-entropy of a linear head without keeping the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.precision import widen

# Rows of logits that exist at once: 100 MB at a vocabulary of 49,152 in bf16 are enough for a CPU's matmuls. GPUs take
# more, so that the weight's gradient, which may be as large, is read, rounded and written less often.
_CHUNK, _CUDA_CHUNK = 1024, 4096
# Rows of logits start at multiples of so many columns: cuBLAS has only slow kernels for rows of odd length.
_ALIGNMENT = 64
# Rows that are widened to float32 and normalised at once: what stays in a processor's cache.
_BLOCK = 64


def _softmax_minus_target(logits: Tensor, targets: Tensor, ignore: int, keep: bool) -> Tensor:
    """Sum of the losses of logits [R, V]; with `keep` the logits become their own gradients."""
    if use_triton(logits):
        from moeforge.kernels.triton import cross_entropy as on_gpu

        return on_gpu.softmax_minus_target(logits, targets, ignore, keep).sum()
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


class _Gradient(torch.autograd.Function):
    """0, whose gradient for `x` is the given one times the incoming scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return torch.zeros_like(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # A scalar tensor does not widen the product, and stays in its own precision: 1 / tokens is no bf16 number.
        return ctx.saved_tensors[0] * grads[0], None, None


def with_gradients(loss: Tensor, *gradients: tuple[Tensor, Tensor | None]) -> Tensor:
    """`loss`, a scalar computed without autograd, as a function of tensors whose gradients are at hand.

    Each is a node of its own, so that a split backward pass scales one at a time.
    """
    for x, gradient in gradients:
        if gradient is not None and x.requires_grad:
            loss = loss + _Gradient.apply(x, gradient, loss.detach())
    return loss


@torch.no_grad()
def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore: int, wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    loss = torch.zeros((), dtype=widen(x[:0]).dtype, device=x.device)
    grad_x = torch.empty_like(x) if wanted else None
    grad_weight = None
    tokens, columns = x.shape[0], weight.shape[0]
    chunk = min(_CUDA_CHUNK if x.is_cuda else _CHUNK, tokens)
    buffer = x.new_empty(chunk, -(-columns // _ALIGNMENT) * _ALIGNMENT)[:, :columns]
    even, *odd = _even_first(columns, x.is_cuda)
    for start in range(0, tokens, chunk or 1):
        part = slice(start, start + chunk)
        logits = buffer[: min(chunk, tokens - start)]
        for some in (even, *odd):
            torch.mm(x[part], weight[some].t(), out=logits[:, some])
        loss += _softmax_minus_target(logits, targets[part], ignore, keep=wanted)
        if grad_x is None:
            continue
        # The gradients are made while the logits are at hand, and scaled by the incoming scalar later.
        torch.mm(logits[:, even], weight[even], out=grad_x[part])
        for some in odd:
            grad_x[part].addmm_(logits[:, some], weight[some])
        if grad_weight is None:
            grad_weight = torch.empty_like(weight)
        for some in (even, *odd):
            if start:
                grad_weight[some].addmm_(logits[:, some].t(), x[part])
            else:
                torch.mm(logits[:, some].t(), x[part], out=grad_weight[some])
    return loss, grad_x, grad_weight


def _even_first(columns: int, on_gpu: bool) -> list[slice]:
    """All columns, on GPUs with those that are left over from multiples of 16 bytes apart: see `_ALIGNMENT`."""
    even = columns // 8 * 8 if on_gpu else columns
    return [slice(even), slice(even, columns)] if 0 < even < columns else [slice(columns)]


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, ignore: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[target]; targets equal to `ignore` count nothing.

    Scalar in float32 (float64 for float64 inputs). The gradients are computed in the forward pass, chunk by
    chunk (Liger kernel's scheme), so that the logits [T, V] never exist as a whole.
    """
    wanted = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    loss, grad_x, grad_weight = _loss_and_gradients(x_TD, weight_VD, targets_T, ignore, wanted)
    return with_gradients(loss, (x_TD, grad_x), (weight_VD, grad_weight))
