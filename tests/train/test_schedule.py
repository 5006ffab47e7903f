from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.train import learning_rate

SHAPE: dict[str, Any] = {"peak": 1.0, "warmup_steps": 10, "min_ratio": 0.1, "decay_fraction": 0.2}


def test_cosine_reaches_peak_and_floor() -> None:
    rates = [learning_rate(s, 100, kind="cosine", **SHAPE) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.55, abs=0.02)


def test_wsd_is_stable_then_linear() -> None:
    rates = [learning_rate(s, 100, kind="wsd", **SHAPE) for s in range(100)]
    assert set(rates[10:81]) == {1.0}
    steps = [a - b for a, b in zip(rates[80:], rates[81:], strict=False)]
    assert max(steps) == pytest.approx(min(steps))
    assert rates[99] == pytest.approx(0.1)


def test_constant() -> None:
    assert {learning_rate(s, 100, kind="constant", **SHAPE) for s in range(10, 100)} == {1.0}


@given(
    steps=st.integers(1, 300), kind=st.sampled_from(["cosine", "wsd", "constant"]), data=st.data(),
    floor=st.floats(0, 1), fraction=st.floats(0, 1),
)  # fmt: skip
def test_rates_stay_between_floor_and_peak(
    steps: int, kind: Any, data: st.DataObject, floor: float, fraction: float
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(step, steps, 3.0, kind, warmup, floor, fraction)
    assert 0 < rate <= 3.0 or floor == 0
    if step >= warmup:
        assert 3.0 * floor - 1e-12 <= rate <= 3.0 + 1e-12
