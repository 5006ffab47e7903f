"""How the next token is chosen: the parameters of a request, and the sampler of a batch.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeforge.errors import UserError

GREEDY_BELOW = 1e-5  # a temperature under this is greedy: dividing by it would only overflow
_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request; names and defaults are vLLM's.

    temperature     0 is greedy
    top_k           only the k likeliest tokens; 0 or -1 is all
    top_p           only the likeliest tokens whose probabilities first sum to top_p
    min_p           only tokens at least min_p times as likely as the likeliest
    max_tokens      most tokens to generate
    seed            the same seed gives the same tokens, whatever else is in the batch; None is random
    stop            strings that end the text (and are not part of it)
    stop_token_ids  tokens that end the text beside the model's own end tokens
    ignore_eos      go on after the model's own end tokens

    After the temperature, truncations apply in the order min_p, top_k, top_p, each on what is left.
    Raises UserError for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, fine, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= -1, "a positive number, or 0 or -1 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("stop", "" not in self.stop, "strings that are not empty"),
        ):
            if not fine:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether some tokens are excluded."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _mix(x: int) -> int:
    """splitmix64's finaliser on Python integers: neighbouring seeds become unrelated keys."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _mix_tensor(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose products wrap; masking the sign's copies makes shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def exponential_noise(seeds_B: Tensor, positions_B: Tensor, vocab_size: int) -> Tensor:
    """Independent Exp(1) variables [B, V], float32: a pure function of (seed, position, token).

    A hash by counter (splitmix64), so that neither the batch nor the device changes what a request draws.
    """
    keys_B = _mix_tensor(seeds_B + (positions_B + 1) * _signed(0x9E3779B97F4A7C15))
    tokens_V = torch.arange(1, vocab_size + 1, device=seeds_B.device)
    bits = _mix_tensor(keys_B[:, None] + tokens_V * _signed(0xD1B54A32D192ED03)) & (2**53 - 1)
    # -log(1 - u) with u near 0 kept at full relative precision: the smallest values decide the draw.
    return -torch.log1p(-(bits.float() + 0.5) * 2.0**-53)


class Sampler:
    """Draws the next token of every sequence of a batch with its own parameters."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._all_greedy = all(p.greedy for p in params)
        self._greedy = torch.tensor([p.greedy for p in params], device=device)
        self._temperature = column([1.0 if p.greedy else p.temperature for p in params])
        keys = [_mix(random.getrandbits(64) if p.seed is None else p.seed & _MASK_64) for p in params]
        self._seeds = torch.tensor([_signed(key) for key in keys], device=device)
        rows = [i for i, p in enumerate(params) if p.truncates and not p.greedy]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device) if rows else None
        self._top_k = column([params[i].top_k if params[i].top_k > 0 else math.inf for i in rows])
        self._top_p = column([params[i].top_p for i in rows])
        self._min_p = column([params[i].min_p for i in rows])

    def __call__(self, logits_BV: Tensor, positions_B: Tensor) -> Tensor:
        """Tokens [B], int64; -1 where a row's greatest logit is not finite. Never waits for the device.

        positions_B: the position that each new token will take, which selects its noise.
        """
        logits_BV = logits_BV.float()
        greatest, tokens = logits_BV.max(-1)
        if not self._all_greedy:
            p_BV = self.probabilities(logits_BV)
            # The smallest of E_i / p_i with E_i ~ Exp(1) is i with probability p_i (exponential race).
            race = p_BV / exponential_noise(self._seeds, positions_B, p_BV.shape[1])
            tokens = torch.where(self._greedy, tokens, race.argmax(-1))
        return tokens.where(greatest.isfinite(), -1)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn from [B, V]: softmax after temperature, truncated, not renormalised."""
        p_BV = (logits_BV / self._temperature).softmax(-1)
        if self._rows is not None:
            p_BV[self._rows] = self._truncate(p_BV[self._rows])
        return p_BV

    def _truncate(self, p_bV: Tensor) -> Tensor:
        """Zero for excluded tokens. The likeliest one always stays; ties go to the lower token."""
        p, order = p_bV.sort(dim=-1, descending=True, stable=True)
        p = p.where(p >= self._min_p * p[:, :1], 0.0)
        p = p.where(torch.arange(p.shape[1], device=p.device) < self._top_k, 0.0)
        before = p.cumsum(-1) - p
        p = p.where((before < self._top_p * p.sum(-1, keepdim=True)) | (self._top_p >= 1), 0.0)
        return torch.zeros_like(p).scatter_(1, order, p)
