"""Matmuls of an expert-sorted buffer with each expert's weight: products, and their two gradients apart.

No autograd here: what differentiates (`experts.py`) calls the gradients when it wants them. bfloat16 on sm_90 goes to
torch's grouped matmul (CUTLASS), all else on GPUs to Triton, and the reference runs elsewhere. sm_100 has torch's too,
but leaves the weight gradient of an expert without rows undefined (pytorch/pytorch#172439).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8_weight import Activations, Fp8Weight, fp8_linear_reference
from moeforge.kernels.permute import expert_rows
from moeforge.kernels.swiglu import swiglu_forward


def grouped_matmul(
    x_RK: Tensor,
    weight_ENK: Tensor | Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
) -> Tensor:
    """x[r] W_e^T of each row's expert e: [R, N] in x's dtype, summed in float32 (float64 in float64).

    x_RK [R, K] sorted by expert, weight [E, N, K] in x's dtype or e4m3, offsets_E int32 [E]: the end row of each
    expert, not read on the host of a GPU. Rows past the last one hold nothing defined. `activations` and `input_scale`,
    one number, as in `fp8_linear_reference`; plain weights want "none".
    """
    if isinstance(weight_ENK, Tensor) and _cutlass(x_RK, weight_ENK):
        return F.grouped_mm(x_RK.contiguous(), weight_ENK.transpose(1, 2), offs=offsets_E)
    if use_triton(x_RK):
        from moeforge.kernels.triton import grouped_matmul as kernels

        return kernels.grouped_matmul(x_RK, weight_ENK, offsets_E, activations, input_scale)
    return grouped_matmul_reference(x_RK, weight_ENK, offsets_E, activations, input_scale)


def grouped_swiglu(
    x_RD: Tensor,
    w13: Tensor | Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up of `grouped_matmul`'s result: [R, F] for w13 [E, 2F, D], gate rows first.

    Triton's kernel does both, with the same bits: the result [R, 2F] is neither written nor read.
    """
    if use_triton(x_RD) and not (isinstance(w13, Tensor) and _cutlass(x_RD, w13)):
        from moeforge.kernels.triton import grouped_matmul as kernels

        return kernels.matmul(x_RD, w13, offsets_E, activations, input_scale, gated=True)
    return swiglu_forward(grouped_matmul(x_RD, w13, offsets_E, activations, input_scale))


def grouped_input_grad(grad_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient [R, K] of `grouped_matmul`'s x for the gradient [R, N] of its result: grad[r] W_e."""
    if _cutlass(grad_RN, weight_ENK):
        return F.grouped_mm(grad_RN.contiguous(), weight_ENK, offs=offsets_E)
    if use_triton(grad_RN):
        from moeforge.kernels.triton import grouped_matmul as kernels

        return kernels.grouped_input_grad(grad_RN, weight_ENK, offsets_E)
    return grouped_input_grad_reference(grad_RN, weight_ENK, offsets_E)


def grouped_weight_grad(grad_RN: Tensor, x_RK: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient [E, N, K] of `grouped_matmul`'s weight: grad^T x over each expert's rows, zero where it has none."""
    if _cutlass(grad_RN, x_RK):
        return F.grouped_mm(grad_RN.contiguous().t(), x_RK.contiguous(), offs=offsets_E)
    if use_triton(grad_RN):
        from moeforge.kernels.triton import weight_grad as kernels

        return kernels.grouped_weight_grad(grad_RN, x_RK, offsets_E)
    return grouped_weight_grad_reference(grad_RN, x_RK, offsets_E)


def grouped_matmul_reference(
    x_RK: Tensor,
    weight_ENK: Tensor | Fp8Weight,
    offsets_E: Tensor,
    activations: Activations = "none",
    input_scale: Tensor | None = None,
) -> Tensor:
    """What `grouped_matmul` must agree with: a loop over experts, in any dtype. Rows past the last offset are zero."""
    columns = (weight_ENK.values if isinstance(weight_ENK, Fp8Weight) else weight_ENK).shape[1]
    y = x_RK.new_zeros(x_RK.shape[0], columns)
    matrices: Iterable[Tensor | Fp8Weight] = weight_ENK.unbind()
    for matrix, rows in zip(matrices, expert_rows(offsets_E), strict=True):
        if isinstance(matrix, Fp8Weight):
            y[rows] = fp8_linear_reference(x_RK[rows], matrix, activations, input_scale)
        else:
            torch.mm(x_RK[rows], matrix.t(), out=y[rows])
    return y


def grouped_input_grad_reference(grad_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """What `grouped_input_grad` must agree with. Rows past the last offset are zero."""
    return grouped_matmul_reference(grad_RN, weight_ENK.transpose(1, 2), offsets_E)


def grouped_weight_grad_reference(grad_RN: Tensor, x_RK: Tensor, offsets_E: Tensor) -> Tensor:
    """What `grouped_weight_grad` must agree with."""
    out = x_RK.new_empty(offsets_E.shape[0], grad_RN.shape[1], x_RK.shape[1])
    for matrix, rows in zip(out, expert_rows(offsets_E), strict=True):
        torch.mm(grad_RN[rows].t(), x_RK[rows], out=matrix)
    return out


def _cutlass(*operands: Tensor) -> bool:
    """Whether torch's grouped matmul on sm_90 takes them, once activations are contiguous: 16-byte rows, not empty."""
    return all(_takes(x) for x in operands) and torch.cuda.get_device_capability(operands[0].device)[0] == 9


def _takes(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.numel() > 0
        and all(size % 8 == 0 for size in x.shape[1:])
        and x.data_ptr() % 16 == 0
        and (x.dim() == 2 or x.is_contiguous())
    )
