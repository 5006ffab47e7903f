"""Feed-forward of many experts at once over an expert-sorted buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _sizes(offsets_E: Tensor) -> list[int]:
    ends = offsets_E.tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def expert_mlp_reference(x_RD: Tensor, w13: Tensor, w2: Tensor, offsets_E: Tensor) -> Tensor:
    """The plain loop over experts that `expert_mlp` must agree with; any dtype, autograd by torch."""
    outputs = [
        F.linear(swiglu(F.linear(x, up)), down)
        for x, up, down in zip(x_RD.split(_sizes(offsets_E)), w13.unbind(), w2.unbind(), strict=True)
    ]
    return torch.cat(outputs)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
        h = F.grouped_mm(x, w13.transpose(1, 2), offs=offsets)
        ctx.save_for_backward(x, h, w13, w2, offsets)
        return F.grouped_mm(swiglu_forward(h), w2.transpose(1, 2), offs=offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, h, w13, w2, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        # The activation is computed again from h: it is half of h's size and cheap beside the matmuls.
        activation, grad_h = swiglu_backward(h, F.grouped_mm(grad, w2, offs=offsets))
        grad_w2 = F.grouped_mm(grad.t(), activation, offs=offsets)
        grad_w13 = F.grouped_mm(grad_h.t(), x, offs=offsets)
        return F.grouped_mm(grad_h, w13, offs=offsets), grad_w13, grad_w2, None


def expert_mlp(x_RD: Tensor, w13: Tensor, w2: Tensor, offsets_E: Tensor) -> Tensor:
    """w2_e silu(gate) * up of each row's expert e.

    x_RD [R, D] sorted by expert, w13 [E, 2F, D] gate rows first, w2 [E, D, F], offsets_E int32 [E] end rows, the
    last one R. float64 takes the reference loop, and so does what `grouped_mm` refuses: widths that are not
    multiples of 16 bytes, no rows, no columns.
    """
    aligned = (x_RD.shape[1] * x_RD.element_size()) % 16 == 0 and (w2.shape[2] * w2.element_size()) % 16 == 0
    if x_RD.dtype in _GROUPED_DTYPES and aligned and x_RD.shape[0] and w2.shape[2]:
        return _ExpertMLP.apply(x_RD, w13, w2, offsets_E)
    return expert_mlp_reference(x_RD, w13, w2, offsets_E)
