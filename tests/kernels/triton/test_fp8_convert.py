from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels import fp8_weight
from moeforge.kernels.triton.fp8_convert import (
    e4m3_to,
    quantize_activations,
    quantize_kernel,
    scaled_float16,
    to_e4m3_bytes,
)

from .compiling import ARCHITECTURES, cross_compile


@triton.jit
def _decode(codes, out, DTYPE: tl.constexpr):
    index = tl.arange(0, 256)
    tl.store(out + index, e4m3_to(tl.load(codes + index), DTYPE))


@triton.jit
def _encode(x, out, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, to_e4m3_bytes(tl.load(x + index)))


@pytest.mark.parametrize("dtype", [(torch.float16, tl.float16), (torch.float32, tl.float32)])
def test_every_code_is_read_exactly(dtype: tuple[torch.dtype, tl.dtype], device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=dtype[0], device=device)
    _decode[(1,)](codes.to(device), out, dtype[1])
    expected = codes.view(torch.float8_e4m3fn).to(dtype[0])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def same_codes(ours: Tensor, expected: Tensor) -> bool:
    """The same bytes, where any NaN is any other."""
    ours, expected = (y.cpu().view(torch.uint8).int() for y in (ours, expected))
    return bool(((ours == expected) | ((ours & expected & 0x7F) == 0x7F)).all())


def test_rounding_agrees_with_torch(device: str) -> None:
    """Every bfloat16, and every number halfway between two codes with its neighbours."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (codes[1:] + codes[:-1]) / 2
    halves = torch.cat([half, torch.nextafter(half, half + 1), torch.nextafter(half, half - 1)])
    x = torch.cat([every, halves, -halves])
    x = torch.cat([x, x.new_zeros(-x.numel() % 4096)])
    out = torch.empty(x.shape, dtype=torch.uint8, device=device)
    _encode[(x.numel() // 4096,)](x.to(device), out, 4096)
    assert same_codes(out, x.clamp(-448, 448).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_agree_with_the_reference(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 1500) * torch.tensor([1e-3, 1, 1, 1e2, 1, 1, 3]).unsqueeze(1)).to(dtype).to(device)
    x[1] = 0
    x[2, 1400] = torch.nan
    x[4, 3] = -torch.inf
    for inputs in (x, x.t().contiguous().t(), x[:1].expand(3, -1), x[:, :0], x[:0]):
        fixed = torch.tensor(0.004, device=device)
        blocks = [(fixed, 16), (None, 0), (None, 112)] if dtype == torch.bfloat16 else [(None, 16)]
        for scale, offset in ((None, None), (fixed, None), *blocks):
            if offset is not None and not inputs.numel():
                continue  # weights of no columns have no blocks
            values, scales = quantize_activations(inputs, scale, offset)
            expected, expected_scales = fp8_weight.quantize_activations(inputs, scale, offset)
            assert same_codes(values, expected)
            assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))


def test_float16_values_and_their_scales(device: str) -> None:
    """Rows of every size that bfloat16 has, and of all sizes at once: exact but for 2^-39 of the largest."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rows = torch.cat([every[:-128].view(255, 128).float(), torch.randn(255, 128).mul(2.0**-120)], 1)
    rows = torch.cat([rows[:, :100].sign() * 0, rows], 1).bfloat16()
    wide = every[:-128].view(1, -1)
    for x in (rows, wide, rows.t().contiguous().t(), rows[:, :0], rows[:0], torch.zeros(2, 5, dtype=torch.bfloat16)):
        # The interpreter widens bfloat16's subnormal numbers wrongly.
        values, scales = scaled_float16(x.to(device) if device == "cuda" else x.float())
        assert values.isfinite().all() and values.dtype == torch.float16
        exact = x.double()
        error = (values.cpu().double() * scales.cpu().double() - exact).abs()
        if x.numel():
            largest = exact.abs().amax(1, keepdim=True)
            assert (error <= largest * 2.0**-39).all()
        assert (scales.log2() == scales.log2().round()).all()  # powers of two
    special = torch.tensor([[1.0, torch.inf, 0.0], [torch.nan, 1.0, -torch.inf]], dtype=torch.bfloat16)
    values, scales = scaled_float16(special.to(device))
    product = values.cpu().float() * scales.cpu()
    assert product[0, 1] == torch.inf and product[1].isnan().tolist() == [True, False, False]
    assert product[1, 2] == -torch.inf and scales.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture: int) -> None:
    types = {"x": "*bf16", "values": "*u8", "scales": "*fp32"} | dict.fromkeys(("columns", "x_row", "offset"), "i32")
    for dynamic, blocks in ((True, 1), (False, 1), (True, 12)):
        constants = {"x_column": 1, "BLOCKS": blocks, "DYNAMIC": dynamic, "BLOCK": 128 if blocks > 1 else 1024}
        cross_compile(quantize_kernel, architecture, types, constants)
