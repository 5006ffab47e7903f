from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.report.canvas import compact, rounded


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.99998, "0.99998"),
        (0.999985, "0.999985"),
        (-0.995, "-0.995"),
        (1234567.0, "1.23M"),
        (3.1e-5, "3.1e-5"),
        (math.nan, "–"),
    ],
)
def test_numbers_for_readers(value: float, text: str) -> None:
    assert compact(value) == text


@given(st.floats(1e-10, 9e-3))
def test_what_is_missing_to_one_can_be_read(gap: float) -> None:
    shown = float(rounded(1 - gap))
    assert shown < 1 and 1 - shown == pytest.approx(gap, rel=0.06, abs=1e-11)
