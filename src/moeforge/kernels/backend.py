"""The one decision where a computation runs: in Triton's kernels, or in torch's."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(x: Tensor) -> bool:
    """Whether a computation on x goes to a Triton kernel: on CUDA devices, where triton is installed.

    float64 stays with torch: the kernels compute in float32. Under Triton's interpreter (TRITON_INTERPRET=1), tensors
    of the CPU go to the kernels too.
    """
    return (x.is_cuda or _INTERPRETED) and x.dtype != torch.float64 and _INSTALLED
