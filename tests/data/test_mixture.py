import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeforge.data.mixture import epoch_order, sequences_per_epoch


def test_weight_multiplies_natural_size() -> None:
    assert sequences_per_epoch([100, 100, 7, 3, 0], [1.0, 0.5, 2.0, 0.0, 1.0]) == [100, 50, 14, 0, 0]
    assert sequences_per_epoch([3], [0.01]) == [1]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.3, 1.0, 1.5, 2.0])), min_size=1, max_size=4),
    st.integers(0, 2**63),
    st.integers(0, 5),
)
def test_every_source_is_used_evenly(parts: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = [n for n, _ in parts], [w for _, w in parts]
    counts = sequences_per_epoch(sizes, weights)
    order = epoch_order(sizes, counts, seed, epoch)
    assert len(order) == sum(counts)
    seen = np.bincount(order, minlength=sum(sizes))
    for size, count, part in zip(sizes, counts, np.split(seen, np.cumsum(sizes)[:-1]), strict=True):
        assert part.sum() == count
        if size:
            assert set(part) <= {count // size, -(-count // size)}
    assert (order == epoch_order(sizes, counts, seed, epoch)).all()


def test_downsampling_moves_on_through_the_source() -> None:
    seen = np.bincount(np.concatenate([epoch_order([10], [3], 0, epoch) for epoch in range(10)]))
    assert seen.tolist() == [3] * 10


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_order([50], [50], seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
