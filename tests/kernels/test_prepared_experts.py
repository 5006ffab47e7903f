"""Prepared experts against the plain ones."""

from __future__ import annotations

import pytest
import torch

from moeforge.kernels import PreparedExperts, expert_mlp_reference, native

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@pytest.fixture(params=["native", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", CLOSE)
def test_they_are_the_reference_loop(dtype: torch.dtype, deterministic: bool) -> None:
    w13, w2 = torch.randn(4, 96, 32).to(dtype) / 6, torch.randn(4, 32, 48).to(dtype) / 7
    x, offsets = torch.randn(20, 32).to(dtype), torch.tensor([3, 3, 19, 20], dtype=torch.int32)
    y = PreparedExperts(w13, w2, dtype, deterministic)(x, offsets)
    torch.testing.assert_close(
        y, expert_mlp_reference(x, w13, w2, offsets), rtol=2 * CLOSE[dtype], atol=2 * CLOSE[dtype]
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 90, 400])
@pytest.mark.parametrize(("width", "columns"), [(32, 48), (24, 40)])  # whole panels, and not
@pytest.mark.parametrize("dtype", CLOSE)
def test_routed_tokens_come_back_weighted(
    dtype: torch.dtype, width: int, columns: int, tokens: int, deterministic: bool
) -> None:
    w13 = torch.randn(5, 2 * columns, width).to(dtype) / width**0.5
    w2 = torch.randn(5, width, columns).to(dtype) / columns**0.5
    x_TD = torch.randn(tokens, width).to(dtype)
    weights_TK, experts_TK = torch.rand(tokens, 5).topk(2, dim=1)
    experts_TK = experts_TK.where(experts_TK != 3, 2)  # a token may choose an expert twice; one expert has no token
    y_TD = PreparedExperts(w13, w2, dtype, deterministic).routed(x_TD, weights_TK, experts_TK)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for weight, e in zip(weights_TK[t].tolist(), experts_TK[t].tolist(), strict=True):
            one = expert_mlp_reference(x_TD[t : t + 1].double(), w13[e : e + 1].double(), w2[e : e + 1].double(), ONE)
            expected[t] += weight * one[0]
    close = max(CLOSE[dtype], 1e-6)  # the weights are float32
    torch.testing.assert_close(y_TD.double(), expected, rtol=2 * close, atol=2 * close)


ONE = torch.tensor([1], dtype=torch.int32)


def test_deterministic_tokens_have_the_same_bits_in_any_company() -> None:
    w13, w2 = torch.randn(5, 96, 32).bfloat16() / 6, torch.randn(5, 32, 48).bfloat16() / 7
    x_TD = torch.randn(100, 32).bfloat16()
    weights_TK, experts_TK = torch.rand(100, 5).topk(2, dim=1)
    experts = PreparedExperts(w13, w2, torch.bfloat16, deterministic=True)
    together = experts.routed(x_TD, weights_TK, experts_TK)
    for begin, end in ((0, 1), (3, 4), (17, 50), (1, 100)):
        alone = experts.routed(x_TD[begin:end], weights_TK[begin:end], experts_TK[begin:end])
        assert torch.equal(alone, together[begin:end])


def test_experts_without_columns_give_zeros() -> None:
    experts = PreparedExperts(torch.zeros(2, 0, 8), torch.zeros(2, 8, 0), torch.float32)
    assert torch.equal(experts(torch.randn(3, 8), torch.tensor([1, 3], dtype=torch.int32)), torch.zeros(3, 8))
