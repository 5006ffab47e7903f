from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import fp8_weight
from moeforge.kernels.triton import fp8_training
from moeforge.kernels.triton.fp8_training import quantize_rows, quantize_transposed, quantize_weights

from .compiling import ARCHITECTURES, cross_compile

EVERY = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(ours: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Values and scales are the reference's, bit for bit, where any NaN is any other."""
    expected, expected_scales = fp8_weight.quantize_activations(x.cpu())
    values, scales = (y.cpu() for y in ours)
    assert values.dtype == expected.dtype and values.shape == expected.shape and values.is_contiguous()
    codes, wanted = (y.contiguous().view(torch.uint8).int() for y in (values, expected))
    assert ((codes == wanted) | ((codes & wanted & 0x7F) == 0x7F)).all()
    assert scales.shape == expected_scales.shape and torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))


def stack(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(shape) * torch.logspace(-3, 2, shape[-1])).to(dtype).to(device)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("shape", [(7, 1500), (70, 20), (9, 1), (3, 2048), (2, 5000), (2, 16390), (5, 0), (0, 5)])
def test_rows(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    x = stack(shape, dtype, device)
    assert_same(quantize_rows(x), x)


@pytest.mark.parametrize("dtype", EVERY)
def test_rows_apart_and_rows_without_a_scale(dtype: torch.dtype, device: str) -> None:
    wide = stack((8, 1300), dtype, device)
    wide[0], wide[2, 1290], wide[4, 3], wide[6, 700] = 0, torch.nan, -torch.inf, torch.inf
    for x in (
        wide,
        wide[::2],
        wide[:, 3:1291],
        wide[:, 700:720].t(),
        wide[:1].expand(3, -1),
        wide[1, :1].expand(3, 40),
    ):
        assert_same(quantize_rows(x), x)


def halves() -> Tensor:
    """Rows with scales from the least to the greatest, of quotients halfway between two codes and next to that."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    half = (codes[1:] + codes[:-1]) / 2
    torch.manual_seed(0)
    scale = (2.0 ** torch.arange(-125, 119, 3).double() * (1 + torch.rand(82))).float()
    largest = (448 * scale.double()).float().unsqueeze(1)
    x = (half * (largest / torch.full_like(largest, 448)).double()).float()
    beside = [(x.view(torch.int32) + step).view(torch.float32) for step in range(-3, 4)]
    rows = torch.cat([*beside, largest, torch.zeros_like(largest)], 1)
    return torch.cat([rows, -rows], 1).flip(1)


def test_quotients_halfway_between_two_codes_and_negative_zeros(device: str) -> None:
    x = halves()
    assert_same(quantize_rows(x.to(device)), x)
    x[3, 5], x[4, 5] = torch.inf, torch.nan
    x = torch.stack([x, x.flip(0)])
    assert_same(quantize_transposed(x.transpose(1, 2).contiguous().to(device)), x)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(
    "shape", [(2, 133, 70), (1, 600, 130), (3, 128, 64), (3, 1, 1), (2, 5, 0), (1, 0, 5), (0, 3, 4)]
)
def test_transposed(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    x = stack(shape, dtype, device)
    assert_same(quantize_transposed(x), x.transpose(1, 2))


@pytest.mark.parametrize("dtype", EVERY)
def test_columns_without_a_scale(dtype: torch.dtype, device: str) -> None:
    x = stack((2, 530, 9), dtype, device)
    x[:, :, 0], x[0, :, 1], x[1, 529, 2], x[0, 3, 4], x[1, 520, 5] = 0, -0.0, torch.nan, torch.inf, -torch.inf
    assert_same(quantize_transposed(x), x.transpose(1, 2))


def test_weights_in_any_order(device: str) -> None:
    x = stack((3, 20, 34), torch.float32, device)
    for weight in (x, x.transpose(1, 2), x[:, 2:, 1:], x[:, ::2].transpose(1, 2), x[:, :1], x[1:2].transpose(1, 2)):
        assert_same(quantize_weights(weight), weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles(architecture: int, dtype: str) -> None:
    sizes = dict.fromkeys(("rows", "columns"), "i32")
    values = {"values_ptr": "*u8" if architecture < 89 else "*fp8e4nv", "scales_ptr": "*fp32"}
    types = {"x_ptr": f"*{dtype}"} | sizes
    for warps, pieces in ((4, {"COLUMNS": 4096, "REST": 512}), (16, {"COLUMNS": 16384, "REST": 0})):
        row_types = types | values | {"x_stride": "i32"}
        cross_compile(fp8_training._rows, architecture, row_types, {"ROWS": 1} | pieces, num_warps=warps)
    maxima = types | {"largest_ptr": "*i32"}
    cross_compile(fp8_training._column_maxima, architecture, maxima, fp8_training._MAXIMA)
    for aligned in (True, False):
        cross_compile(
            fp8_training._transposed, architecture, types | values, fp8_training._TILE, num_warps=8, aligned=aligned
        )
