"""Linear maps over weights in e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8_weight import Activations, Fp8Weight, fp8_linear_reference


def fp8_linear(
    x_RK: Tensor, weight: Fp8Weight, activations: Activations = "none", input_scale: Tensor | None = None
) -> Tensor:
    """x W^T [R, N] in x's dtype, as `fp8_linear_reference`, which runs in that dtype where Triton does not."""
    if use_triton(x_RK):
        from moeforge.kernels.triton import linear as kernels

        return kernels.fp8_linear(x_RK, weight, activations, input_scale)
    return fp8_linear_reference(x_RK, weight, activations, input_scale, x_RK.dtype)


def multiplied_activations(activations: Activations, device: torch.device) -> Activations:
    """What inference makes of `activations`: "none" where the device cannot multiply e4m3 with e4m3.

    Rounding activations to 8 bits is for speed alone, so devices without such matmuls (CPUs, GPUs before sm_89) compute
    the weights' product with the activations as they are, which is nearer to the model before quantisation.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return activations
    return "none"
