from __future__ import annotations

import pytest
import torch

from moeforge.kernels.fp8 import to_e4m3
from moeforge.kernels.fp8_linear import fp8_linear, multiplied_activations
from moeforge.kernels.fp8_weight import Fp8Weight, dequantize, fp8_linear_reference


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agrees_with_the_reference(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    weight = Fp8Weight(to_e4m3(torch.randn(40, 200)).to(device), torch.rand(3, 2, device=device))
    x = torch.randn(9, 200, dtype=dtype, device=device)
    for activations, scale in (("none", None), ("dynamic", None), ("static", torch.tensor(0.004, device=device))):
        y = fp8_linear(x, weight, activations, scale)
        exact = fp8_linear_reference(x.double(), weight, activations, scale)
        assert y.dtype == dtype
        # Weights, and the result, are rounded to bf16 where that is x's dtype: in proportion to what is summed.
        size = x.double().abs() @ dequantize(weight, torch.float64).abs().T
        rounding = 2**-8 if dtype == torch.bfloat16 or y.is_cuda else 1e-6
        assert ((y.double() - exact).abs() <= rounding * size).all()


def test_activations_stay_as_they_are_where_e4m3_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplied_activations("dynamic", torch.device("cpu")) == "none"
    for capability, expected in (((8, 6), "none"), ((8, 9), "dynamic"), ((9, 0), "dynamic")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert multiplied_activations("dynamic", torch.device("cuda")) == expected
