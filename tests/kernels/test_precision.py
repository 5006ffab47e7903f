import pytest
import torch

from moeforge.kernels.precision import widen


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_widen_never_narrows(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = torch.randn(3).to(dtype)
    wide = widen(x)
    assert wide.dtype == expected
    assert torch.equal(wide.to(dtype), x)
    assert (wide is x) == (dtype == expected)
