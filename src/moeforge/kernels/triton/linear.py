"""Linear maps over weights in e4m3, in Triton: the grouped kernel with one expert, which has all rows."""

from __future__ import annotations

from torch import Tensor

from moeforge.kernels.fp8_weight import Activations, Fp8Weight
from moeforge.kernels.triton.configs import Config
from moeforge.kernels.triton.grouped_matmul import matmul


def fp8_linear(
    x_RK: Tensor,
    weight: Fp8Weight,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """As `moeforge.kernels.fp8_linear.fp8_linear`; weight [N, K]."""
    stack = Fp8Weight(weight.values[None], weight.scales[None], weight.column_offset)
    return matmul(x_RK, stack, None, activations, input_scale, config)
