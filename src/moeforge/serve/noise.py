"""Random numbers by counter: a pure function of a key and a position, so that neither the batch nor the device changes
what a request draws.
"""

from __future__ import annotations

import random

_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def request_key(seed: int | None, index: int = 0) -> int:
    """The key of continuation `index` of a request, 64 bits; without a seed a new one each call."""
    key = _mix(random.getrandbits(64) if seed is None else seed & _MASK_64)
    return _mix((key + index * _GOLDEN) & _MASK_64) if index else key


def uniform(key: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53."""
    return (_mix((key + (position + 1) * _GOLDEN) & _MASK_64) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """splitmix64's finaliser: neighbouring numbers become unrelated ones."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)
