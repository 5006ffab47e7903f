"""One weight in e4m3.

Legend: N rows, K columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moeforge.checkpoint.fp8_scales import row_scales
from moeforge.config.quantization import Scales
from moeforge.kernels.fp8 import e4m3_scale, to_e4m3
from moeforge.kernels.fp8_weight import BLOCK
from moeforge.quantize.gptq import Feedback, gptq


def quantize_weight(weight_NK: Tensor, scales: Scales, known: Feedback | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 values [N, K], and the float32 scales to multiply them by, as they lie on disk: the largest magnitude / 448
    of the tensor (0-d), of each row [N, 1], or of each block of 128 x 128 [N / 128, K / 128] rounded up.

    The nearest values, or with the `feedback` of samples of what the weight multiplies, on its device, those that
    `gptq` finds. The scale of nothing but zeros is 1. The weight must be finite.
    """
    wide = weight_NK.float()
    if scales == "tensor":
        largest = wide.abs().amax()
    elif scales == "channel":
        largest = wide.abs().amax(1, keepdim=True)
    else:
        padded = F.pad(wide, (0, -wide.shape[1] % BLOCK, 0, -wide.shape[0] % BLOCK))
        largest = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))
    stored = e4m3_scale(largest)
    spread = _spread(stored, wide, scales)
    if known is None:
        return to_e4m3(wide / spread), stored
    return gptq(wide, spread.expand_as(wide), known), stored


def relative_error(weight_NK: Tensor, values_NK: Tensor, stored: Tensor, scales: Scales) -> float:
    """Frobenius norm of what quantisation changed, over that of the weight; 0 for zeros."""
    wide = weight_NK.float()
    norm = wide.norm().item()
    return (values_NK.float() * _spread(stored, wide, scales) - wide).norm().item() / norm if norm else 0.0


def _spread(stored: Tensor, weight_NK: Tensor, scales: Scales) -> Tensor:
    """The scales as they are divided by: [N, 1] or [N, K]."""
    by_row = row_scales(stored, weight_NK.shape[0], scales)
    return by_row.repeat_interleave(BLOCK, 1)[:, : weight_NK.shape[1]] if scales == "block128" else by_row
