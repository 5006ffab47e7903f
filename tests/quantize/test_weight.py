from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.config.quantization import Scales
from moeforge.kernels.fp8_weight import BLOCK
from moeforge.quantize.weight import quantize_weight, relative_error

GROUPS: dict[Scales, tuple[int, int]] = {"tensor": (10**6, 10**6), "channel": (1, 10**6), "block128": (BLOCK, BLOCK)}


def groups(weight: Tensor, scales: Scales) -> list[tuple[slice, slice]]:
    height, width = GROUPS[scales]
    rows, columns = weight.shape
    starts = [(i, j) for i in range(0, rows, height) for j in range(0, columns, width)]
    return [(slice(i, i + height), slice(j, j + width)) for i, j in starts]


@pytest.mark.parametrize("scales", GROUPS)
@pytest.mark.parametrize("shape", [(256, 256), (130, 300), (7, 5)])
def test_every_group_uses_the_whole_range_and_rounds_to_half_a_step(scales: Scales, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    values, stored = quantize_weight(weight, scales)
    found = groups(weight, scales)
    assert values.dtype == torch.float8_e4m3fn and stored.dtype == torch.float32 and stored.numel() == len(found)
    for (rows, columns), scale in zip(found, stored.flatten(), strict=True):
        part, kept = weight[rows, columns], values[rows, columns].float()
        assert kept.abs().max() == 448
        torch.testing.assert_close(scale, part.abs().max() / 448)
        # Three bits of fraction: half a step is 1/16 of the value, or of the smallest normal one (2^-6).
        assert ((kept * scale - part).abs() <= torch.maximum(part.abs(), scale * 2**-6) / 16 * 1.0001).all()
    assert stored.shape == {"tensor": (), "channel": (shape[0], 1)}.get(
        scales, (-(-shape[0] // 128), -(-shape[1] // 128))
    )


@pytest.mark.parametrize("scales", GROUPS)
def test_zeros_have_scale_one_and_tiny_values_become_zeros(scales: Scales) -> None:
    for weight in (torch.zeros(130, 140), torch.full((130, 140), 1e-42)):
        values, stored = quantize_weight(weight, scales)
        assert (stored == 1).all() and not values.float().any()
    assert relative_error(torch.zeros(3, 3), *quantize_weight(torch.zeros(3, 3), scales), scales) == 0


@pytest.mark.parametrize("scales", GROUPS)
def test_the_error_is_that_of_rounding_alone(scales: Scales) -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 333).bfloat16()
    values, stored = quantize_weight(weight, scales)
    error = relative_error(weight, values, stored, scales)
    by_group = torch.zeros(200, 333)
    for (rows, columns), scale in zip(groups(weight, scales), stored.flatten(), strict=True):
        by_group[rows, columns] = values[rows, columns].float() * scale
    assert error == pytest.approx(((by_group - weight.float()).norm() / weight.float().norm()).item())
    assert 0.02 < error < 0.03
    exact = values.float() * 2.0
    assert relative_error(exact, *quantize_weight(exact, "tensor"), "tensor") < 1e-6
