"""The one rule for computing in higher precision."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """float32 for 16-bit tensors; float32 and float64 stay as they are, so float64 runs are float64 throughout."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
