"""8-bit floats of the kind e4m3 (OCP FP8): 4 exponent bits, 3 of fraction, largest value 448, no infinity."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def to_e4m3(x: Tensor) -> Tensor:
    """x rounded to e4m3; what lies beyond +-448 becomes +-448, NaN stays NaN, on every device."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def e4m3_scale(largest: Tensor) -> Tensor:
    """The float32 scale that takes magnitudes up to `largest` to E4M3_MAX: largest / 448, 1 where that is no normal
    number. The same bits on every device."""
    scale = largest / torch.full_like(largest, E4M3_MAX)  # GPUs multiply by the inverse of a Python number
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)


def from_e4m3(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, exactly."""
    if x.device.type != "cpu":
        return x.to(dtype)
    # By table: torch converts one element at a time on CPU, about six times slower.
    return _table(dtype).index_select(0, x.reshape(-1).view(torch.uint8).int()).view(x.shape)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3).to(torch.float32).to(dtype)
