from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.train import AdaptiveCoefficients, drop_rate

RATES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(rates=RATES, alpha_max=st.floats(0, 0.1), xi=st.floats(0, 2), beta=st.floats(0, 1))
def test_alpha_follows_equations_7_to_9(rates: list[float], alpha_max: float, xi: float, beta: float) -> None:
    control = AdaptiveCoefficients(1, alpha_max, xi, beta, adaptive=True)
    alpha = alpha_max
    for d in rates:
        control.update(torch.tensor([d], dtype=torch.float64))
        alpha = beta * alpha + (1 - beta) * min(xi * d, alpha_max)
        assert control.alpha.item() == pytest.approx(alpha, abs=1e-15)
        assert 0 <= control.alpha.item() <= alpha_max + 1e-15


def test_layers_have_their_own_coefficient() -> None:
    control = AdaptiveCoefficients(3, 0.01, 0.2, 0.9, adaptive=True)
    for _ in range(200):
        control.update(torch.tensor([0.0, 0.02, 0.9], dtype=torch.float64))
    assert control.alpha.tolist() == pytest.approx([0.0, 0.004, 0.01], abs=1e-9)


def test_fixed_alpha_stays() -> None:
    control = AdaptiveCoefficients(2, 0.01, 0.2, 0.9, adaptive=False)
    control.update(torch.zeros(2, dtype=torch.float64))
    assert control.alpha.tolist() == [0.01, 0.01]


@given(rates=RATES)
def test_state_round_trip_is_exact(rates: list[float]) -> None:
    one, two = (AdaptiveCoefficients(1, 0.01, 0.2, 0.99, adaptive=True) for _ in range(2))
    for d in rates:
        one.update(torch.tensor([d], dtype=torch.float64))
    two.load(one.state())
    assert torch.equal(one.alpha, two.alpha)


@given(loads=st.lists(st.integers(0, 50), min_size=2, max_size=16), factor=st.floats(0.5, 3))
def test_global_drop_rate_counts_the_pooled_overflow(loads: list[int], factor: float) -> None:
    total = sum(loads)
    load = torch.tensor([loads], dtype=torch.float64)
    totals = {"assignments": load.sum(1), "load": load, "overflow": torch.zeros(1, dtype=torch.float64)}
    limit = math.ceil(total * factor / len(loads))
    expected = sum(max(0, n - limit) for n in loads) / max(total, 1)
    assert drop_rate(totals, "global", factor).item() == pytest.approx(expected)


def test_group_drop_rate_is_overflow_over_assignments() -> None:
    totals = {
        "assignments": torch.tensor([100.0, 0.0], dtype=torch.float64),
        "overflow": torch.tensor([7.0, 0.0], dtype=torch.float64),
    }
    assert drop_rate(totals, "group", 1.25).tolist() == [0.07, 0.0]
