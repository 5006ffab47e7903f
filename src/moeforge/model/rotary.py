"""Angles of the rotary embedding, with the scaling kinds of transformers' `rope_parameters`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, RopeConfig


def _llama3(inverse: Tensor, rope: RopeConfig, original: int) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a smooth ramp between."""
    wavelength = 2 * math.pi / inverse
    ramp = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * inverse / rope.factor + ramp * inverse


def _yarn(inverse: Tensor, rope: RopeConfig, original: int, dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): interpolate the dimensions that turn rarely, keep those that turn often."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=inverse.device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def rotary_angles(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, h/2] in `dtype`; computed in float32 (float64 for float64)."""
    rope, dim = config.rope, config.head_dim
    original = rope.original_max_positions or config.max_positions
    theta, device = rope.theta, positions_T.device
    if rope.kind == "dynamic":
        length = max(int(positions_T.max()) + 1, original) if len(positions_T) else original
        theta *= (rope.factor * length / original - (rope.factor - 1)) ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    inverse = 1.0 / theta**exponent
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, rope, original)
    elif rope.kind == "yarn":
        inverse = _yarn(inverse, rope, original, dim)
    attention = 1.0
    if rope.kind == "yarn":
        attention = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle = positions_T.to(wide)[:, None, None] * inverse.to(wide)
    return (angle.cos() * attention).to(dtype), (angle.sin() * attention).to(dtype)
