from __future__ import annotations

import pytest
import torch

from moeforge.kernels.fp8 import E4M3, from_e4m3, to_e4m3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_code_converts_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(4, 64)
    back = from_e4m3(codes, dtype)
    assert back.dtype == dtype and back.shape == (4, 64)
    torch.testing.assert_close(back, codes.to(torch.float32).to(dtype), rtol=0, atol=0, equal_nan=True)
    finite = ~back.isnan()
    assert torch.equal(to_e4m3(back)[finite].view(torch.uint8), codes[finite].view(torch.uint8))


def test_values_beyond_the_range_saturate_and_nan_stays() -> None:
    x = torch.tensor([1e9, -1e9, float("inf"), 449.0, float("nan"), 1e-9])
    back = from_e4m3(to_e4m3(x), torch.float32)
    assert back[:4].tolist() == [448, -448, 448, 448]
    assert back[4].isnan() and back[5] == 0
