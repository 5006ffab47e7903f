"""Properties of the one function that divides units over ranks."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.partition import partition

RANKS = st.integers(1, 12)
UNITS = st.integers(0, 300)
WEIGHT = st.one_of(st.integers(0, 96), st.floats(0, 1e3, allow_nan=False, allow_subnormal=False))


def weights_for(ranks: int) -> st.SearchStrategy[list[float]]:
    return st.lists(WEIGHT, min_size=ranks, max_size=ranks).filter(any)


def counts(ranges):
    return [end - begin for begin, end in ranges]


def assert_contiguous(ranges, units):
    assert ranges[0][0] == 0 and ranges[-1][1] == units
    assert all(end == begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))
    assert all(begin <= end for begin, end in ranges)


def test_36_heads_over_8_ranks_are_the_known_split_and_rotate():
    first, carry = partition(36, 8)
    assert counts(first) == [5, 5, 5, 5, 4, 4, 4, 4]
    second, carry = partition(36, 8, carry=carry)
    assert counts(second) == [4, 4, 4, 4, 5, 5, 5, 5]
    assert carry == (0,) * 8


def test_fewer_units_than_ranks_leave_empty_ranges_that_take_turns():
    carry, held = None, []
    for _ in range(5):
        ranges, carry = partition(1, 5, carry=carry)
        assert_contiguous(ranges, 1)
        held.append(counts(ranges).index(1))
    assert held == [0, 1, 2, 3, 4]


def test_uneven_memories_and_a_rank_of_weight_zero():
    assert partition(36, 3, [24, 12, 0])[0] == ((0, 24), (24, 36), (36, 36))
    carry = None
    for _ in range(20):
        ranges, carry = partition(7, 3, [1, 0, 1], carry)
        assert counts(ranges)[1] == 0


@given(st.data(), UNITS, RANKS)
def test_one_layer_is_contiguous_and_within_one_unit_of_the_quota(data, units, ranks):
    weights = data.draw(weights_for(ranks))
    ranges, carry = partition(units, ranks, weights)
    assert_contiguous(ranges, units)
    quotas = [units * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    for count, quota, owed in zip(counts(ranges), quotas, carry, strict=True):
        assert abs(count - quota) < 1
        assert owed == quota - count
    assert sum(carry) == 0


@given(RANKS, st.lists(UNITS, min_size=1, max_size=60))
def test_equal_weights_stay_within_one_unit_of_the_exact_sum_over_any_layers(ranks, sizes):
    carry, held = None, [0] * ranks
    for layers, units in enumerate(sizes, start=1):
        ranges, carry = partition(units, ranks, carry=carry)
        assert_contiguous(ranges, units)
        assert max(counts(ranges)) - min(counts(ranges)) <= 1
        held = [total + count for total, count in zip(held, counts(ranges), strict=True)]
        exact = Fraction(sum(sizes[:layers]), ranks)
        assert all(abs(total - exact) < 1 for total in held)


@given(st.data(), RANKS, st.lists(UNITS, min_size=1, max_size=40))
def test_any_weights_converge_within_the_stated_bound(data, ranks, sizes):
    weights = data.draw(weights_for(ranks))
    carry, held, exact, bound = None, [Fraction(0)] * ranks, [Fraction(0)] * ranks, Fraction(0)
    for units in sizes:
        ranges, carry = partition(units, ranks, weights, carry)
        quotas = [units * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        for rank, quota in enumerate(quotas):
            assert abs(counts(ranges)[rank] - quota) <= 1
            held[rank] += counts(ranges)[rank]
            exact[rank] += quota
            bound += (quota % 1) * (1 - quota % 1)
        deviations = [total - due for total, due in zip(held, exact, strict=True)]
        assert tuple(-deviation for deviation in deviations) == carry
        assert sum(deviation**2 for deviation in deviations) <= bound


@given(st.data(), UNITS, RANKS)
def test_scaling_all_weights_changes_nothing(data, units, ranks):
    weights = data.draw(st.lists(st.integers(0, 96), min_size=ranks, max_size=ranks).filter(any))
    assert partition(units, ranks, weights) == partition(units, ranks, [weight * 1024 for weight in weights])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2), "units = -1: must be at least 0"),
        ((4, 0), "ranks = 0: must be at least 1"),
        ((4, 2, [1]), "weights = 1: must have one number for each of the 2 ranks"),
        ((4, 2, [0, 0]), "weights = 0,0: must be at least 0 each, and not all 0"),
        ((4, 2, [1, -1]), "weights = 1,-1: must be at least 0 each"),
        ((4, 2, [1, float("nan")]), "weights = 1,nan: must be finite"),
        ((4, 2, None, [0]), "carry = 0: must have one number for each of the 2 ranks"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        partition(*arguments)
