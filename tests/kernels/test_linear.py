"""Prepared weights against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.kernels import PreparedExperts, PreparedWeight, expert_mlp_reference, linear
from moeforge.kernels.linear import can_pack

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 130), st.integers(1, 130), st.booleans(), st.booleans()
)
def test_a_prepared_weight_computes_what_the_plain_one_does(
    dtype: torch.dtype, rows: int, out: int, inner: int, bias: bool, deterministic: bool
) -> None:
    x, weight = torch.randn(rows, inner).to(dtype), (torch.randn(out, inner) / inner**0.5).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    y = linear(x, PreparedWeight(weight, deterministic), b)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, weight, b), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner"), [(96, 64), (576, 1536), (70, 50)])
def test_deterministic_rows_have_the_same_bits_in_any_company(
    dtype: torch.dtype, out: int, inner: int, pack: bool
) -> None:
    weight, x = torch.randn(out, inner).to(dtype), torch.randn(200, inner).to(dtype)
    prepared = PreparedWeight(weight, deterministic=True, pack=pack)
    together = prepared.linear(x)
    for begin, end in ((0, 1), (3, 4), (17, 50), (1, 200), (199, 200)):
        assert torch.equal(prepared.linear(x[begin:end]), together[begin:end])


def test_what_is_packed() -> None:
    assert not can_pack(torch.zeros(0, 4)) and not can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert PreparedWeight(torch.zeros(4, 4), pack=False).packed is False
    if torch.backends.mkldnn.is_available():
        assert can_pack(torch.zeros(4, 4))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_experts_are_the_reference_loop(dtype: torch.dtype, deterministic: bool) -> None:
    w13, w2 = torch.randn(4, 96, 32).to(dtype) / 6, torch.randn(4, 32, 48).to(dtype) / 7
    x, offsets = torch.randn(20, 32).to(dtype), torch.tensor([3, 3, 19, 20], dtype=torch.int32)
    y = PreparedExperts(w13, w2, deterministic)(x, offsets)
    torch.testing.assert_close(
        y, expert_mlp_reference(x, w13, w2, offsets), rtol=2 * CLOSE[dtype], atol=2 * CLOSE[dtype]
    )


def test_experts_without_columns_give_zeros() -> None:
    experts = PreparedExperts(torch.zeros(2, 0, 8), torch.zeros(2, 8, 0))
    assert torch.equal(experts(torch.randn(3, 8), torch.tensor([1, 3], dtype=torch.int32)), torch.zeros(3, 8))
