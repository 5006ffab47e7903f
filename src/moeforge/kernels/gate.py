"""The gate: logit normalisation, softmax, top-k (SKYWORK section 2; Skywork-MoE report, equations 2 and 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton

# Below this standard deviation logits count as equal. The released checkpoints divide without any epsilon, so
# it must lie far under a trained router's spread (about 0.1 to 10); it bounds the gradient by lambda / MIN_STD.
MIN_STD = 1e-5


class Gate(NamedTuple):
    """What a router decided. `probabilities` [T, E] over all experts, `logits` [T, E] those that softmax saw,
    `weights` [T, K] and `experts` [T, K] of the chosen ones in falling order."""

    probabilities: Tensor
    logits: Tensor
    weights: Tensor
    experts: Tensor


def normalize_logits(logits_TE: Tensor, scale: float | Tensor) -> Tensor:
    """scale * (z - mean) / std over the experts of each token, std unbiased (equation 6).

    Equal logits give zeros, in forward and backward finite: the variance is clamped before its root, so below
    MIN_STD the divisor is a constant.
    """
    centred = logits_TE - logits_TE.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (logits_TE.shape[-1] - 1)
    return centred * (scale / variance.clamp_min(MIN_STD**2).sqrt())


class _Gate(torch.autograd.Function):
    """All of it as one kernel, and its gradient as another."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, scale: float | Tensor | None, top_k: int, renormalize: bool) -> Any:
        from moeforge.kernels.triton.gate import gate_forward

        outputs = gate_forward(raw, top_k, scale, MIN_STD, renormalize)
        learned = isinstance(scale, Tensor)
        ctx.save_for_backward(raw, outputs[3], scale if learned else None)
        ctx.scale, ctx.renormalize = None if learned else scale, renormalize
        ctx.mark_non_differentiable(outputs[3])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        from moeforge.kernels.triton.gate import gate_backward

        raw, experts, learned = ctx.saved_tensors
        scale = ctx.scale if learned is None else learned
        return *gate_backward(raw, experts, scale, MIN_STD, ctx.renormalize, *grads[:3]), None, None


def gate(logits_TE: Tensor, top_k: int, scale: float | Tensor | None, renormalize: bool) -> Gate:
    """Softmax over all experts, top-k, then renormalised weights (equation 2).

    logits_TE float32 or float64; `scale` is lambda, None for no normalisation. Ties go to the lower expert index.
    Renormalised weights are computed as the softmax of the chosen logits: the same value, without underflow.
    """
    if use_triton(logits_TE):
        return Gate(*_Gate.apply(logits_TE, scale, top_k, renormalize))
    z = logits_TE if scale is None else normalize_logits(logits_TE, scale)
    probabilities = torch.softmax(z, dim=-1)
    # A stable sort, because torch.topk leaves the order of equal values open.
    experts = torch.sort(z.detach(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(z.gather(1, experts), dim=-1) if renormalize else probabilities.gather(1, experts)
    return Gate(probabilities, z, weights, experts)
