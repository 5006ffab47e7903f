"""Prepared weights against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeforge.kernels import PreparedWeight, linear, native
from moeforge.kernels.linear import can_pack, can_panel

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native library where there is one, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return str(request.param)


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 130), st.integers(1, 130), st.booleans(), st.booleans()
)
def test_a_prepared_weight_computes_what_the_plain_one_does(
    dtype: torch.dtype, rows: int, out: int, inner: int, bias: bool, deterministic: bool
) -> None:
    x, weight = torch.randn(rows, inner).to(dtype), (torch.randn(out, inner) / inner**0.5).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    y = linear(x, PreparedWeight(weight, dtype, deterministic), b)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, weight, b), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner"), [(96, 64), (576, 1536), (70, 50)])
def test_deterministic_rows_have_the_same_bits_in_any_company(dtype: torch.dtype, out: int, inner: int) -> None:
    weight, x = torch.randn(out, inner).to(dtype), torch.randn(200, inner).to(dtype)
    prepared = PreparedWeight(weight, dtype, deterministic=True)
    together = prepared.linear(x)
    for begin, end in ((0, 1), (3, 4), (17, 50), (1, 200), (199, 200)):
        assert torch.equal(prepared.linear(x[begin:end]), together[begin:end])


def test_what_goes_where() -> None:
    assert not can_pack(torch.zeros(0, 4)) and not can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert not can_panel(torch.zeros(4, 4), torch.float32) and not can_panel(
        torch.zeros(4, 3, dtype=torch.bfloat16), torch.bfloat16
    )
    assert can_panel(torch.zeros(4, 4, dtype=torch.bfloat16), torch.bfloat16) is (native.library() is not None)
    if torch.backends.mkldnn.is_available():
        assert can_pack(torch.zeros(4, 4))
