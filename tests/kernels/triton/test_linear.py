from __future__ import annotations

import pytest
import torch

from moeforge.kernels.fp8_weight import Fp8Weight, fp8_linear_reference
from moeforge.kernels.triton.configs import Config
from moeforge.kernels.triton.linear import fp8_linear

from .test_grouped_matmul import assert_near, fp8_weight

SMALL = Config(16, 32, 4, 2, group_m=2)


@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_agrees_with_the_reference_in_float64(kind: str, rows: int, device: str) -> None:
    torch.manual_seed(0)
    stack = fp8_weight(1, 72, 300, kind, device)
    weight = Fp8Weight(stack.values[0], stack.scales[0])
    x = torch.randn(rows, 300, device=device)
    for activations, scale in (("none", None), ("dynamic", None), ("static", torch.tensor(0.006, device=device))):
        y = fp8_linear(x, weight, activations, scale, config=SMALL)
        assert y.shape == (rows, 72)
        if rows:
            assert_near(y, fp8_linear_reference(x, weight, activations, scale, torch.float64))


def test_a_shard_that_begins_inside_a_block(device: str) -> None:
    torch.manual_seed(0)
    stack = fp8_weight(1, 32, 400, "block", device)
    shard = Fp8Weight(stack.values[0, :, 176:320], stack.scales[0, :, 1:3], 176 % 128)
    x = torch.randn(5, 144, device=device)
    assert_near(fp8_linear(x, shard, config=SMALL), fp8_linear_reference(x, shard, dtype=torch.float64))
