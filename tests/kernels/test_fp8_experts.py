from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeforge.kernels.fp8_experts import fp8_expert_mlp
from moeforge.kernels.fp8_weight import Activations, fp8_expert_mlp_reference

from .test_fp8_weight import random_weight


class _Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor of 16 bits or more that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and out.element_size() > 1:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_one_expert_is_dequantised_at_a_time(activations: Activations) -> None:
    torch.manual_seed(0)
    d, f = 48, 144
    w13, w2 = random_weight(4, 2 * f, d), random_weight(4, d, f)
    x, offsets = torch.randn(9, d), torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    with torch.inference_mode(), _Largest() as largest:
        y = fp8_expert_mlp(x, w13, w2, offsets, activations)
    assert largest.elements == 2 * f * d
    torch.testing.assert_close(y, fp8_expert_mlp_reference(x, w13, w2, offsets, activations))
