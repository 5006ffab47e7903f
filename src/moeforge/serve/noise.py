"""Random numbers by counter: a pure function of a key, a position and a token, so that neither the batch nor the device
changes what a request draws.

Legend: B sequences, K candidate tokens.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03


def request_key(seed: int | None, index: int = 0) -> int:
    """The key of continuation `index` of a request, a signed integer of 64 bits; without a seed a new one each call."""
    key = _mix(random.getrandbits(64) if seed is None else seed & _MASK_64)
    return _signed(_mix((key + index * _GOLDEN) & _MASK_64) if index else key)


def exponential_noise(keys_B: Tensor, positions_B: Tensor, tokens: Tensor) -> Tensor:
    """Independent Exp(1) variables [B, K], float32, for `tokens`, [K] or [B, K] (all int64)."""
    keys_B = _mix_tensor(keys_B + (positions_B + 1) * _signed(_GOLDEN))
    bits = _mix_tensor(keys_B[:, None] + (tokens + 1) * _signed(_STEP)) & (2**53 - 1)
    # -log(1 - u) with u near 0 kept at full relative precision: the smallest values decide the draw.
    return -torch.log1p(-(bits.float() + 0.5) * 2.0**-53)


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
