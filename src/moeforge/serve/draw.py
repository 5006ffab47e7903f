"""Drawing tokens: temperature, min_p, top_k, top_p, and the token at which the cumulated weights pass a uniform number.

Weights are whole numbers whose sum is at most 2**53: float64 sums them without rounding in any order, so a row gives
the same token alone or in a batch, and a token of weight zero is never drawn.

Legend: B sequences, b some of them, V vocabulary, N buckets of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeforge.serve.noise import uniform
from moeforge.serve.request import Request


def host_tensor(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python numbers on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Draw:
    """Draws for the same requests again and again, none of them greedy."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return host_tensor(values, dtype, device)[:, None]

        self._device = device
        self._keys = [request.noise_key for request in requests]
        params = [request.params for request in requests]
        self._temperature_B1 = column([p.temperature for p in params], torch.float32)
        self._limits = {
            row: (p.min_p, min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size, p.top_p)
            for row, p in enumerate(params)
            if p.truncates
        }
        min_p, top_k, top_p = zip(*self._limits.values(), strict=True) if self._limits else ((), (), ())
        self._rows = host_tensor(list(self._limits), torch.int64, device)
        self._columns = column(min_p, torch.float32), column(top_k, torch.int64), column(top_p, torch.float64)

    def __call__(self, logits_BV: Tensor, positions: Sequence[int]) -> Tensor:
        """Tokens [B], int64. logits_BV: of any float type; positions: of the new tokens. Waits for no device but the
        CPU."""
        uniforms = [[uniform(key, position)] for key, position in zip(self._keys, positions, strict=True)]
        uniform_B1 = host_tensor(uniforms, torch.float64, self._device)
        if not logits_BV.is_cuda:
            # One row after the other, whose intermediate values stay in the cache.
            return torch.cat([self._draw_row(logits_BV, row, uniform_B1) for row in range(len(uniforms))])
        weights_BV = weigh(logits_BV, self._temperature_B1)
        if self._limits:
            weights_BV[self._rows] = keep_sorted(weights_BV[self._rows], *self._columns)
        return pick(weights_BV, uniform_B1)

    def _draw_row(self, logits_BV: Tensor, row: int, uniform_B1: Tensor) -> Tensor:
        one = slice(row, row + 1)
        weights_1V = weigh(logits_BV[one], self._temperature_B1[one])
        if row in self._limits:
            weights_1V = keep(weights_1V[0], *self._limits[row])[None]
        return pick(weights_1V, uniform_B1[one])


def weigh(logits_BV: Tensor, temperature_B1: Tensor) -> Tensor:
    """What the probabilities are proportional to: whole numbers, float32, at most 2**53 / V. The likeliest token has
    the greatest power of two in this range, or the whole row is zero where any logit is NaN or infinity."""
    greatest = 2.0 ** (53 - (logits_BV.shape[1] - 1).bit_length())
    weights_BV = logits_BV.float() - logits_BV.amax(-1, keepdim=True)
    return weights_BV.div_(temperature_B1).exp_().mul_(greatest).round_().nan_to_num_(0)


def pick(weights_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Tokens [B]: the first whose cumulated weight is above `uniform`, in [0, 1), of the row's sum."""
    sums_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    # The product rounds to less than the sum, so there is such a token, except in a row of zeros.
    tokens_B1 = torch.searchsorted(sums_BV, uniform_B1 * sums_BV[:, -1:], right=True)
    return tokens_B1.flatten().clamp_(max=weights_BV.shape[1] - 1)


def keep(weights_V: Tensor, min_p: float, top_k: int, top_p: float) -> Tensor:
    """Weights [V] on a CPU with zeros for tokens that min_p, top_k or top_p exclude; may change its argument.

    The likeliest token always stays; ties go to the lower one.
    """
    if min_p > 0:
        weights_V = weights_V.where(weights_V >= min_p * weights_V.max(), 0.0)
    if top_k < len(weights_V):
        _cut(weights_V, None, top_k)
    if top_p < 1:
        amounts_V = weights_V.double()
        _cut(weights_V, amounts_V, top_p * amounts_V.sum().item())
    return weights_V


def keep_sorted(weights_bV: Tensor, min_p_b1: Tensor, top_k_b1: Tensor, top_p_b1: Tensor) -> Tensor:
    """`keep` for rows on any device, for which it does not wait; on a CPU, `keep` is 20 times as fast."""
    sorted_bV, tokens_bV = weights_bV.sort(dim=-1, descending=True, stable=True)
    kept_bV = sorted_bV.where(sorted_bV >= min_p_b1 * sorted_bV[:, :1], 0.0).double()
    kept_bV = kept_bV.where(torch.arange(kept_bV.shape[1], device=kept_bV.device) < top_k_b1, 0.0)
    sums_bV = kept_bV.cumsum(-1)
    kept_bV = kept_bV.where((sums_bV - kept_bV < top_p_b1 * sums_bV[:, -1:]) | (top_p_b1 >= 1), 0.0)
    return torch.zeros_like(weights_bV).scatter_(1, tokens_bV, kept_bV.float())


def _cut(weights_V: Tensor, amounts_V: Tensor | None, limit: float) -> None:
    """Sets to zero the weights of tokens for which the amounts of all likelier ones sum to `limit` or more. amounts_V:
    float64, None for 1 each."""
    # The first bits of positive floats order them, so only the tokens of one bucket need sorting.
    buckets_V = weights_V.view(torch.int32) >> 16
    amounts_N = torch.bincount(buckets_V, amounts_V).flip(0)
    sums_N = amounts_N.cumsum(0)
    at = int(torch.searchsorted(sums_N, limit))
    last = len(sums_N) - 1 - at
    # The greatest float below the bucket's and the least above. NumPy finds a few tokens 5 times as fast as torch.
    bits = torch.tensor([max(last << 16, 1) - 1, (last + 1) << 16], dtype=torch.int32)
    below, above = bits.view(torch.float32).tolist()
    weights = weights_V.numpy()
    tokens = np.flatnonzero((weights > below) & (weights < above))
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    amounts = np.ones(len(tokens)) if amounts_V is None else amounts_V.numpy()[tokens]
    before = float(sums_N[at] - amounts_N[at]) + amounts.cumsum() - amounts
    torch.threshold_(weights_V, below, 0.0)
    weights[tokens[before >= limit]] = 0.0
