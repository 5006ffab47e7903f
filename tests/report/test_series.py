"""Thinning keeps spikes; smoothing is an average."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeforge.report.series import finite, mean_over_layers, smooth, thin


@given(st.integers(1, 5000), st.integers(10, 500), st.integers(0, 2**31))
def test_thin_keeps_ends_extremes_and_order(count, limit, seed):
    y = np.random.default_rng(seed).standard_normal(count)
    x = np.arange(count, dtype=float)
    thin_x, thin_y = thin(x, y, limit)
    assert len(thin_x) == len(thin_y) <= max(limit, 1)
    assert (np.diff(thin_x) > 0).all()
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert thin_y.min() == y.min() and thin_y.max() == y.max()
    np.testing.assert_array_equal(y[thin_x.astype(int)], thin_y)


@given(st.floats(-1e3, 1e3), st.integers(1, 100))
def test_smoothing_a_constant_is_that_constant(value, steps):
    np.testing.assert_allclose(smooth(np.full(50, value), steps), value)


def test_smoothing_follows_the_definition_and_skips_nan():
    y = np.array([1.0, np.nan, 3.0])
    keep = 1 - 1 / 4
    np.testing.assert_allclose(smooth(y, 4), [1.0, np.nan, (keep * 1 + 3) / (keep + 1)])
    np.testing.assert_array_equal(smooth(y, 1), y)


def test_smoothing_columns_is_smoothing_each():
    y = np.random.default_rng(0).standard_normal((40, 3))
    y[5, 1] = np.nan
    np.testing.assert_allclose(smooth(y, 7), np.stack([smooth(y[:, i], 7) for i in range(3)], axis=1))


def test_means_and_points_ignore_what_is_missing():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [1.0, 3.0]])
    np.testing.assert_array_equal(mean_over_layers(values), [1.0, np.nan, 2.0])
    assert mean_over_layers(np.empty((3, 0))).shape == (3,)
    x, y = finite(np.array([1.0, 2.0, np.nan]), np.array([np.nan, 5.0, 6.0]))
    assert x.tolist() == [2.0] and y.tolist() == [5.0]
