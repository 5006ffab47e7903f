"""Drawing tokens: temperature, min_p, top_k, top_p, and an exponential race with noise by counter.

Legend: B sequences, b some of them, V vocabulary, K candidate tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.serve.noise import exponential_noise
from moeforge.serve.request import Request

_NARROW = 1024  # on a CPU, the likeliest tokens that are looked at before all are sorted, which takes 30 times as long
_GROUP = 64


def host_tensor(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python numbers on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def greatest(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest value of each row and its token, the lowest of equal ones; NaN where any value is."""
    groups = x_BV.shape[1] // _GROUP
    if x_BV.is_cuda or groups < 2:
        return x_BV.max(-1)
    # On a CPU, torch finds a maximum 50 times as fast as its place.
    x_BGg = x_BV[:, : groups * _GROUP].unflatten(1, (groups, _GROUP))
    values, group = x_BGg.amax(-1).max(-1)
    inside = x_BGg[torch.arange(len(x_BGg)), group].argmax(-1)
    tokens = group * _GROUP + inside
    if groups * _GROUP < x_BV.shape[1]:
        rest, place = x_BV[:, groups * _GROUP :].max(-1)
        tokens = torch.where(rest > values, groups * _GROUP + place, tokens)
        values = torch.maximum(values, rest)
    return values, tokens


class Draw:
    """Draws for the same requests again and again, none of them greedy."""

    def __init__(self, requests: Sequence[Request], vocab_size: int, device: torch.device) -> None:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return host_tensor(values, dtype, device)[:, None]

        params = [request.params for request in requests]
        self._temperature = column([p.temperature for p in params])
        self._keys = host_tensor([request.noise_key for request in requests], torch.int64, device)
        self._vocabulary = torch.arange(vocab_size, device=device)
        rows = [i for i, p in enumerate(params) if p.truncates]
        whole = [i for i, p in enumerate(params) if not p.truncates]
        self._rows = host_tensor(rows, torch.int64, device) if rows else None
        self._whole = host_tensor(whole, torch.int64, device) if whole else None
        self._min_p = column([params[i].min_p for i in rows])
        ks = [min(params[i].top_k, vocab_size) if params[i].top_k > 0 else vocab_size for i in rows]
        self._top_k = column(ks, torch.int64)
        self._top_p = column([params[i].top_p for i in rows])

    def __call__(self, logits_BV: Tensor, positions_B: Tensor) -> Tensor:
        """Tokens [B]. logits_BV: float32; positions_B: of the new tokens, int64. Waits for no device but the CPU."""
        p_BV = (logits_BV / self._temperature).softmax(-1)
        if self._rows is None:
            return self._race(p_BV, self._vocabulary, self._keys, positions_B)
        tokens_B = torch.empty_like(positions_B)
        if self._whole is not None:
            keys, positions = self._keys[self._whole], positions_B[self._whole]
            tokens_B[self._whole] = self._race(p_BV[self._whole], self._vocabulary, keys, positions)
            p_BV = p_BV[self._rows]
        tokens_B[self._rows] = self._truncated(p_BV, self._keys[self._rows], positions_B[self._rows])
        return tokens_B

    def _truncated(self, p_bV: Tensor, keys_b: Tensor, positions_b: Tensor) -> Tensor:
        limits = self._min_p, self._top_k, self._top_p
        if p_bV.is_cuda or p_bV.shape[1] <= 2 * _NARROW:
            p_bK, candidates_bK, _ = keep(p_bV, *limits)
            return self._race(p_bK, candidates_bK, keys_b, positions_b)
        p_bK, candidates_bK, decided_b = keep(p_bV, *limits, width=_NARROW)
        tokens_b = self._race(p_bK, candidates_bK, keys_b, positions_b)
        more = (~decided_b).nonzero().flatten()  # row by row, so that batch mates change nothing
        if len(more):
            min_p, top_k, top_p = (limit[more] for limit in limits)
            p_bK, candidates_bK, _ = keep(p_bV[more], min_p, top_k, top_p)
            tokens_b[more] = self._race(p_bK, candidates_bK, keys_b[more], positions_b[more])
        return tokens_b

    @staticmethod
    def _race(p_BK: Tensor, candidates: Tensor, keys_B: Tensor, positions_B: Tensor) -> Tensor:
        """The smallest of E_i / p_i with E_i ~ Exp(1) is i with probability p_i, which need not sum to 1."""
        candidates_BK = candidates.expand_as(p_BK)
        # On a CPU one row after the other, whose intermediate values stay in its cache: three times as fast.
        rows = len(p_BK) if p_BK.is_cuda else 1
        parts = zip(*(x.split(rows) for x in (p_BK, candidates_BK, keys_B, positions_B)), strict=True)
        places = [greatest(p / exponential_noise(keys, at, tokens))[1] for p, tokens, keys, at in parts]
        return candidates_BK.gather(1, torch.cat(places)[:, None]).squeeze(1)


def keep(
    p_bV: Tensor, min_p_b1: Tensor, top_k_b1: Tensor, top_p_b1: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Falling probabilities [b, K], zero for tokens that min_p, top_k or top_p exclude; their tokens [b, K]; and [b],
    whether that is certain.

    The likeliest token always stays; ties go to the lower one. width: how many tokens are looked at, which may be too
    few to be certain; None: all.
    """
    if width is None:
        p_bK, tokens_bK = p_bV.sort(dim=-1, descending=True, stable=True)
    else:
        tokens_bK = p_bV.topk(width, sorted=False).indices.sort(-1).values
        p_bK, order_bK = p_bV.gather(1, tokens_bK).sort(dim=-1, descending=True, stable=True)
        tokens_bK = tokens_bK.gather(1, order_bK)
    least_b1 = min_p_b1 * p_bK[:, :1]
    kept_bK = p_bK.where(p_bK >= least_b1, 0.0)
    kept_bK = kept_bK.where(torch.arange(p_bK.shape[1], device=p_bK.device) < top_k_b1, 0.0)
    all_b1 = top_k_b1 >= p_bV.shape[1]
    left_b1 = p_bV.where(p_bV >= least_b1, 0.0).sum(-1, keepdim=True)
    left_b1 = torch.where(all_b1, left_b1, kept_bK.sum(-1, keepdim=True))
    before_bK = kept_bK.cumsum(-1) - kept_bK
    kept_bK = kept_bK.where((before_bK < top_p_b1 * left_b1) | (top_p_b1 >= 1), 0.0)
    if width is None:
        return kept_bK, tokens_bK, torch.ones_like(all_b1[:, 0])
    # Certain if the cut lies between two different probabilities that were both looked at.
    smallest_b = kept_bK.where(kept_bK > 0, torch.inf).amin(-1)
    return kept_bK, tokens_bK, (all_b1 | (top_k_b1 <= width))[:, 0] & (smallest_b > p_bK[:, -1])
