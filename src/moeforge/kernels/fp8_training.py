"""Grouped matmuls of training in 8-bit floats: forward products and input gradients; weight gradients stay as they are.

Both operands become e4m3, with one scale for each row of the left one (a token's activations, or its gradient) and one
for each output channel of the weight, found anew in every call from the weight as it then is. Scales so fine leave a
row of gradients little range to cover, so e4m3's third bit of fraction is worth more than e5m2's range, as in
DeepSeek-V3 (arXiv 2412.19437, section 3.3). The input gradient sums over the weight's rows: there its columns are the
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_weight import Fp8Weight, quantize_activations
from moeforge.kernels.grouped import grouped_matmul


def fp8_grouped_matmul(x_RK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_matmul` of x and weight both rounded to e4m3: [R, N] in x's dtype, summed in float32.

    x_RK [R, K] sorted by expert, weight [E, N, K], offsets_E int32 [E] end rows. torch's scaled grouped matmul where
    the hardware has it (sm_90), else `grouped_matmul` over an `Fp8Weight`, which computes with the same values.
    """
    values, scales = _rounded(weight_ENK)
    if _scaled_grouped_mm_takes(x_RK, values):
        x_values, x_scales = _round(x_RK)
        return torch._scaled_grouped_mm(
            x_values,
            values.transpose(1, 2),
            x_scales.squeeze(1),
            scales.squeeze(2),
            offs=offsets_E,
            out_dtype=x_RK.dtype,
        )
    return grouped_matmul(x_RK, Fp8Weight(values, scales), offsets_E, "dynamic")


def fp8_grouped_input_grad(grad_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """`grouped_input_grad` of gradient and weight both rounded to e4m3: [R, K]."""
    return fp8_grouped_matmul(grad_RN, weight_ENK.transpose(1, 2), offsets_E)


def _rounded(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [E, N, K], contiguous, and scales [E, N, 1]. Where wide copies are made, one expert after another."""
    if use_triton(weight_ENK):
        from moeforge.kernels.triton import fp8_training as kernels

        return kernels.quantize_weights(weight_ENK)
    values = torch.empty(weight_ENK.shape, dtype=E4M3, device=weight_ENK.device)
    scales = torch.empty(*weight_ENK.shape[:2], 1, dtype=torch.float32, device=weight_ENK.device)
    for weight_NK, value_NK, scale_N1 in zip(weight_ENK, values, scales, strict=True):
        for to, found in zip((value_NK, scale_N1), quantize_activations(weight_NK), strict=True):
            to.copy_(found)
    return values, scales


def _round(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_activations` with a scale for each row, contiguous; by Triton where it runs: without wide copies."""
    if use_triton(x_RK):
        from moeforge.kernels.triton import fp8_training as kernels

        return kernels.quantize_rows(x_RK)
    return quantize_activations(x_RK.contiguous())


def _scaled_grouped_mm_takes(x: Tensor, values: Tensor) -> bool:
    """bf16 results on sm_90, rows of 16 bytes in both."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[0] > 0
        and all(size % 16 == 0 for size in values.shape[1:])
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )
