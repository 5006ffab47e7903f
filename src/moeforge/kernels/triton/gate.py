"""The gate and its gradient, each in one pass: a program has some tokens' logits of all experts in registers.

For inference the router's matmul comes before, in the same kernel: the logits never leave the registers either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.router import STAGES, logits, step
from moeforge.kernels.triton.rows import as_rows, tile

_ELEMENTS = 512
_TOKENS, _WARPS = 16, 4
"""Of a program that has the router's matmul too."""


@triton.jit
def _normalized(z, real, scale, least_variance, experts):
    """scale * (z - mean) / std of each token, 1 / std, and whether that std is its own."""
    centred = tl.where(real, z - tl.sum(z, 1, keep_dims=True) / experts, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / (experts - 1)
    inverse = 1.0 / tl.sqrt_rn(tl.maximum(variance, least_variance))
    return centred * (scale * inverse), inverse, variance >= least_variance


@triton.jit
def _softmax(z, real):
    """Over the columns that are real."""
    top = tl.max(tl.where(real, z, float("-inf")), 1, keep_dims=True)
    share = tl.where(real, tl.exp(z - top), 0.0)
    return share / tl.sum(share, 1, keep_dims=True)


@triton.jit
def _choose(z, probability, real, K: tl.constexpr, RENORMALIZE: tl.constexpr, CHOICES: tl.constexpr):
    """Weights and experts (int64) of the K largest of the real columns of z, in falling order."""
    expert, choice = tl.arange(0, z.shape[1])[None, :], tl.arange(0, CHOICES)[None, :]
    key = tl.where(z == z, z, float("inf"))  # NaN comes first, as in torch; its rows need a choice too
    free = real
    chosen = tl.zeros((z.shape[0], CHOICES), tl.int32)
    value = tl.zeros((z.shape[0], CHOICES), tl.float32)
    for k in tl.static_range(K):
        top = tl.max(tl.where(free, key, float("-inf")), 1, keep_dims=True)
        first = tl.min(tl.where(free & (key == top), expert, z.shape[1]), 1, keep_dims=True)
        taken = expert == first
        free = free & ~taken
        chosen = tl.where(choice == k, first, chosen)
        source = z if RENORMALIZE else probability
        value = tl.where(choice == k, tl.sum(tl.where(taken, source, 0.0), 1, keep_dims=True), value)
    weight = _softmax(value, choice < K) if RENORMALIZE else value
    return weight, chosen.to(tl.int64)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    raw_ptr, probability_ptr, z_ptr, weight_ptr, expert_ptr, tokens, stride, scale_ptr, scale, least_variance,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    choice = tl.arange(0, CHOICES)[None, :]
    real = expert < E
    inside = (token < tokens) & real
    z = tl.load(raw_ptr + token * stride + expert, inside, other=0.0)
    if NORMALIZE:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        z, _, _ = _normalized(z, real, scale, least_variance, E)
        tl.store(z_ptr + token * E + expert, z, inside)
    probability = _softmax(z, real)
    tl.store(probability_ptr + token * E + expert, probability, inside)

    weight, chosen = _choose(z, probability, real, K, RENORMALIZE, CHOICES)
    inside = (token < tokens) & (choice < K)
    tl.store(weight_ptr + token * K + choice, weight, inside)
    tl.store(expert_ptr + token * K + choice, chosen, inside)


@triton.jit(do_not_specialize=["tokens"])
def _route(
    x_ptr, router_ptr, bias_ptr, weight_ptr, expert_ptr, tokens, columns, stride, scale, least_variance,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    z = logits(x_ptr, router_ptr, bias_ptr, token, expert, tokens, columns, stride, E, COLUMNS, GROUPS)
    token, real, choice = token[:, None], (expert < E)[None, :], tl.arange(0, CHOICES)[None, :]
    if NORMALIZE:
        z, _, _ = _normalized(z, real, scale, least_variance, E)
    weight, chosen = _choose(z, _softmax(z, real), real, K, RENORMALIZE, CHOICES)
    inside = (token < tokens) & (choice < K)
    tl.store(weight_ptr + token * K + choice, weight, inside)
    tl.store(expert_ptr + token * K + choice, chosen, inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    raw_ptr, expert_ptr, probability_grad_ptr, z_grad_ptr, weight_grad_ptr, grad_ptr, scale_grad_ptr,
    tokens, stride, scale_ptr, scale, least_variance,
    E: tl.constexpr, K: tl.constexpr, NORMALIZE: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    real = expert < E
    inside = (token < tokens) & real
    z = tl.load(raw_ptr + token * stride + expert, inside, other=0.0)
    if NORMALIZE:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        unit, inverse, varies = _normalized(z, real, 1.0, least_variance, E)
        z = unit * scale

    grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    probability_grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if z_grad_ptr is not None:
        grad += tl.load(z_grad_ptr + token * E + expert, inside, other=0.0)
    if weight_grad_ptr is not None:
        chosen = expert < 0
        weight_grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
        for k in tl.static_range(K):
            taken = expert == tl.load(expert_ptr + token * K + k, token < tokens, other=0)
            chosen = chosen | taken
            weight_grad += tl.where(taken, tl.load(weight_grad_ptr + token * K + k, token < tokens, other=0.0), 0.0)
        if RENORMALIZE:
            weight = _softmax(z, chosen)
            grad += weight * (weight_grad - tl.sum(weight * weight_grad, 1, keep_dims=True))
        else:
            probability_grad += weight_grad
    if probability_grad_ptr is not None:
        probability_grad += tl.load(probability_grad_ptr + token * E + expert, inside, other=0.0)
    probability = _softmax(z, real)
    grad += probability * (probability_grad - tl.sum(probability * probability_grad, 1, keep_dims=True))

    if NORMALIZE:
        along = tl.sum(grad * unit, 1, keep_dims=True)
        if scale_grad_ptr is not None:
            tl.store(scale_grad_ptr + token, along, token < tokens)
        grad = (grad - tl.where(varies, unit * along / (E - 1), 0.0)) * (scale * inverse)
        grad = grad - tl.sum(tl.where(real, grad, 0.0), 1, keep_dims=True) / E
    tl.store(grad_ptr + token * E + expert, grad, inside)


Scale = float | Tensor | None


def gate_forward(
    raw_TE: Tensor, top_k: int, scale: Scale, least_std: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `moeforge.kernels.Gate`: probabilities [T, E], logits [T, E], weights and experts [T, K]."""
    raw = as_rows(raw_TE)
    tokens, experts = raw.shape
    probabilities, z = raw.new_empty(raw.shape), raw_TE if scale is None else raw.new_empty(raw.shape)
    weights, chosen = raw.new_empty(tokens, top_k), raw.new_empty(tokens, top_k, dtype=torch.int64)
    size = tile(experts, _ELEMENTS)
    _forward[(triton.cdiv(tokens, size.rows),)](
        raw, probabilities, z, weights, chosen, tokens, raw.stride(0), *_scale(scale), least_std**2,
        experts, top_k, scale is not None, renormalize, size.rows, size.columns, triton.next_power_of_2(top_k),
        num_warps=size.warps,
    )  # fmt: skip
    return probabilities, z, weights, chosen


def route(
    x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None, top_k: int, scale: float | None, renormalize: bool,
    least_std: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights (float32) and experts (int64) [T, K] of the logits x W^T + b, summed in float32.

    x and W of one 16-bit type, W contiguous. A token's bits do not depend on how many others there are.
    """
    x, (experts, columns) = as_rows(x_TD), router_ED.shape
    weights = x.new_empty(len(x), top_k, dtype=torch.float32)
    chosen = x.new_empty(len(x), top_k, dtype=torch.int64)
    width = max(16, triton.next_power_of_2(experts))
    _route[(triton.cdiv(len(x), _TOKENS),)](
        x, router_ED, bias_E, weights, chosen, len(x), columns, x.stride(0), scale, least_std**2,
        experts, top_k, scale is not None, renormalize, _TOKENS, width, triton.next_power_of_2(top_k),
        step(_TOKENS, width), _groups(width), num_warps=_WARPS, num_stages=STAGES,
    )  # fmt: skip
    return weights, chosen


def _groups(width: int) -> int:
    """For `logits`: with more experts each warp has enough of them to do."""
    return _WARPS if width <= 32 else 1


def gate_backward(
    raw_TE: Tensor, experts_TK: Tensor, scale: Scale, least_std: float, renormalize: bool, *grads: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the raw logits and, where it is a tensor, of the scale.

    `grads`: those of the probabilities, of the logits that softmax saw, and of the weights; None for zero.
    """
    raw = as_rows(raw_TE)
    tokens, experts = raw.shape
    grad = raw.new_empty(raw.shape)
    scale_grad = raw.new_empty(tokens) if isinstance(scale, Tensor) else None
    size = tile(experts, _ELEMENTS)
    _backward[(triton.cdiv(tokens, size.rows),)](
        raw, experts_TK, *(g if g is None else g.contiguous() for g in grads), grad, scale_grad,
        tokens, raw.stride(0), *_scale(scale), least_std**2,
        experts, experts_TK.shape[1], scale is not None, renormalize, size.rows, size.columns, num_warps=size.warps,
    )  # fmt: skip
    return grad, None if scale_grad is None else scale_grad.sum()


def _scale(scale: Scale) -> tuple[Tensor | None, float | None]:
    """By address or by value: to read a tensor here would wait for the device."""
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)
