"""Feed-forward of many experts over weights in e4m3, for inference."""

from __future__ import annotations

from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8_weight import Activations, Fp8Weight, fp8_expert_mlp_reference
from moeforge.kernels.grouped import grouped_matmul, grouped_swiglu


def fp8_expert_mlp(
    x_RD: Tensor,
    w13: Fp8Weight,
    w2: Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """As `fp8_expert_mlp_reference`: by Triton where it runs, else in x's dtype, one dequantised expert at a
    time."""
    if use_triton(x_RD):
        activation_RF = grouped_swiglu(x_RD, w13, offsets_E, activations, input_scales[0])
        return grouped_matmul(activation_RF, w2, offsets_E, activations, input_scales[1])
    return fp8_expert_mlp_reference(x_RD, w13, w2, offsets_E, activations, input_scales, x_RD.dtype)
