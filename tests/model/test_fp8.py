"""FP8 matrices inside modules: what they compute before anything is prepared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeforge.config.quantization import QuantizationConfig
from moeforge.kernels import expert_mlp
from moeforge.kernels.fp8_weight import Fp8Weight, dequantize, fp8_expert_mlp_reference, fp8_linear_reference
from moeforge.model.fp8 import Fp8Matrix
from moeforge.model.units import Experts, Linear

KINDS = [("tensor", "none"), ("channel", "dynamic"), ("block128", "dynamic"), ("tensor", "static")]


def filled(module: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape)
        parameter.data.copy_(values.abs() / 50 + 0.01 if "scale" in name else values * 20)


@pytest.mark.parametrize("offset", [0, 80])
@pytest.mark.parametrize(("scales", "activations"), KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(scales: Any, activations: Any, offset: int, bias: bool) -> None:
    linear = Linear(48, 200, bias, Fp8Matrix(scales, activations, 1024 + offset))
    filled(linear)
    assert linear.weight.dtype == torch.float8_e4m3fn and not linear.weight.requires_grad
    assert linear.fp8_weight().column_offset == offset
    x = torch.randn(5, 200)
    expected = fp8_linear_reference(x, linear.fp8_weight(), activations, linear.input_scale)
    torch.testing.assert_close(linear.project(x), expected)
    torch.testing.assert_close(linear(x), expected if linear.bias is None else expected + linear.bias)
    assert (linear.input_scale is not None) == (activations == "static")


@pytest.mark.parametrize(("scales", "activations"), KINDS)
def test_experts(scales: Any, activations: Any) -> None:
    matrices = Fp8Matrix(scales, activations, aligned=False), Fp8Matrix(scales, activations, 40)
    experts = Experts(64, 3, 104, matrices)
    filled(experts)
    x, offsets = torch.randn(9, 64), torch.tensor([4, 4, 9], dtype=torch.int32)
    w13, w2 = experts.fp8_weights()
    assert w13.group_rows == 1 and w2.group_rows == (1 if scales == "channel" else 16)
    fixed = experts.w13_input_scale, experts.w2_input_scale
    expected = fp8_expert_mlp_reference(x, w13, w2, offsets, activations, fixed)
    torch.testing.assert_close(experts(x, offsets), expected)
    if activations == "none":
        plain = expert_mlp(x, dequantize(w13, torch.float32), dequantize(w2, torch.float32), offsets)
        torch.testing.assert_close(experts(x, offsets), plain)


def test_a_matrix_that_is_not_quantised() -> None:
    assert Fp8Matrix.of(None) is None
    made = Fp8Matrix.of(QuantizationConfig("block128", "dynamic"), 300, False)
    assert made == Fp8Matrix("block128", "dynamic", 300, False)
    assert made.block_range(100) == (2, 4) and made.scales_shape(7, 100) == (7, 2)
    assert isinstance(made.weight(torch.empty(7, 100), torch.empty(7, 2)), Fp8Weight)
