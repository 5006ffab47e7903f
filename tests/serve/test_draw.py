"""The distribution that tokens are drawn from, and its truncations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.serve.draw import Draw, keep, keep_sorted, pick, weigh
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams

V = 40
LOGITS = st.integers(0, 2**31).map(lambda seed: torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3)
CPU = torch.device("cpu")


def requests(*params: dict[str, Any]) -> list[Request]:
    return [Request(str(i), None, [1], SamplingParams(**p), 9) for i, p in enumerate(params)]


def weights_of(logits: torch.Tensor, temperature: float = 1) -> torch.Tensor:
    return weigh(logits[None], torch.tensor([[temperature]]))[0]


def kept(logits: torch.Tensor, min_p: float = 0, top_k: int = V, top_p: float = 1) -> torch.Tensor:
    """Weights after truncation: the same in buckets, as on a CPU, and sorted, as on other devices."""
    weights = weights_of(logits)
    sort = keep_sorted(weights[None], torch.tensor([[min_p]]), torch.tensor([[top_k]]),
                       torch.tensor([[top_p]], dtype=torch.float64))[0]  # fmt: skip
    assert torch.equal(keep(weights.clone(), min_p, min(top_k, len(logits)), top_p), sort)
    changed = sort != weights
    assert not sort[changed].any()
    return sort


@given(LOGITS, st.floats(0.5, 100))
def test_weights_are_probabilities_in_whole_numbers(logits: torch.Tensor, temperature: float) -> None:
    weights = weights_of(logits, temperature)
    assert torch.equal(weights, weights.round()) and weights.double().sum() <= 2**53
    torch.testing.assert_close(weights / weights.sum(), (logits / temperature).softmax(0), rtol=1e-4, atol=1e-9)


@given(LOGITS, st.integers(1, V + 5))
def test_top_k_keeps_the_k_likeliest(logits: torch.Tensor, k: int) -> None:
    chosen = kept(logits, top_k=k) > 0
    assert chosen.sum() == min(k, V)
    assert chosen.all() or logits[chosen].min() >= logits[~chosen].max()


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_sum_to_p(logits: torch.Tensor, top_p: float) -> None:
    full = logits.softmax(0)
    chosen = kept(logits, top_p=top_p) > 0
    assert full[chosen].sum() >= top_p - 1e-5
    assert full[chosen].sum() - full[chosen].min() < top_p + 1e-5
    assert chosen.all() or full[chosen].min() >= full[~chosen].max()


@given(LOGITS, st.floats(0.01, 1))
def test_min_p_is_relative_to_the_likeliest(logits: torch.Tensor, min_p: float) -> None:
    weights = weights_of(logits)
    assert torch.equal(kept(logits, min_p=min_p) > 0, weights >= min_p * weights.max())


@given(LOGITS, st.integers(1, 20), st.floats(0.05, 0.95))
def test_top_p_counts_what_top_k_left(logits: torch.Tensor, k: int, top_p: float) -> None:
    inside = logits.topk(k).indices
    only_inside = torch.full((V,), -math.inf)
    only_inside[inside] = logits[inside]
    assert torch.equal(kept(logits, top_k=k, top_p=top_p), kept(only_inside, top_p=top_p))


@given(LOGITS, st.floats(0.01, 0.5), st.floats(0.05, 0.95))
def test_top_p_counts_what_min_p_left(logits: torch.Tensor, min_p: float, top_p: float) -> None:
    only_inside = logits.where(kept(logits, min_p=min_p) > 0, -math.inf)
    assert torch.equal(kept(logits, min_p=min_p, top_p=top_p), kept(only_inside, top_p=top_p))


@given(st.integers(1, 5))
def test_ties_go_to_the_lower_token(k: int) -> None:
    assert torch.equal(kept(torch.zeros(V), top_k=k).nonzero().flatten(), torch.arange(k))


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([-math.inf, -60.0, -3.0, -1.0, 0.0, 0.5, 0.501, 2.0]), min_size=V, max_size=V),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1, 2, 5, 8, 12, V]),
    st.sampled_from([1e-300, 0.1, 0.5, 0.9, 0.99, 1 - 2**-53, 1.0]),
)
def test_ties_and_zeros_are_cut_as_by_sorting(values: list[float], min_p: float, top_k: int, top_p: float) -> None:
    values[7] = 0.5
    weights = kept(torch.tensor(values), min_p, top_k, top_p)
    assert weights.argmax() == torch.tensor(values).argmax() and weights.max() == weights_of(torch.tensor(values)).max()


def test_large_rows_are_cut_as_by_sorting() -> None:
    generator = torch.Generator().manual_seed(3)
    for scale in (0, 0.01, 1, 8):
        logits = torch.randn(5001, generator=generator) * scale
        for min_p, top_k, top_p in ((0, 40, 1), (0, 5001, 0.95), (0.03, 3000, 0.5)):
            assert kept(logits, min_p, top_k, top_p).any()


@given(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=2, max_size=9).filter(any))
def test_the_first_token_whose_sum_is_above_is_picked(values: list[float]) -> None:
    """Also at both ends of [0, 1): never one of weight zero."""
    weights = torch.tensor([values])
    scaled = weights * 2.0**40 + (weights > 0)  # a sum that rounds when multiplied
    owners = [token for token, value in enumerate(values) for _ in range(int(value))]
    for w in (weights, scaled):
        assert pick(w, torch.zeros(1, 1, dtype=torch.float64)) == owners[0]
        assert pick(w, torch.full((1, 1), 1 - 2.0**-53, dtype=torch.float64)) == owners[-1]
    middles = (torch.arange(len(owners), dtype=torch.float64) + 0.5) / len(owners)
    assert pick(weights.expand(len(owners), -1), middles[:, None]).tolist() == owners


@pytest.mark.parametrize(
    ("params", "left"), [({}, 6), ({"top_k": 4}, 4), ({"top_p": 0.9}, 3), ({"min_p": 0.03, "top_k": 5}, 4)]
)
def test_draws_follow_the_probabilities(params: dict[str, Any], left: int) -> None:
    logits, draws = torch.tensor([0.0, 1.0, -math.inf, 1.8, -1.0, 0.3, -1.5, -math.inf]), 2000
    params = {"temperature": 0.7, "seed": 11, **params}
    one = Draw(requests(params), len(logits), CPU)
    tokens = torch.cat([one(logits[None], [position]) for position in range(draws)])
    many = Draw(requests(*({**params, "seed": seed} for seed in range(draws))), len(logits), CPU)
    across = many(logits.expand(draws, -1), [5] * draws)
    p = kept(logits / 0.7, params.get("min_p", 0), params.get("top_k", len(logits)), params.get("top_p", 1)).double()
    p /= p.sum()
    assert (p > 0).sum() == left
    for sample in (tokens, across):
        counts = torch.bincount(sample, minlength=len(logits))
        assert not counts[p == 0].any()
        chi_square = ((counts - draws * p) ** 2 / (draws * p))[p > 0].sum()
        assert chi_square < 26, (counts, p)  # 5 degrees of freedom: less often than once in 10000


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6, unique=True), st.data())
def test_a_draw_depends_on_its_own_seed_position_and_logits_only(seeds: list[int], data: st.DataObject) -> None:
    pool = [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1, "top_k": 9}]
    made = requests(*({"seed": seed, **data.draw(st.sampled_from(pool))} for seed in seeds))
    width = data.draw(st.sampled_from([V, 1003]))  # rows that begin anywhere in memory
    logits = torch.randn(len(seeds), width, generator=torch.Generator().manual_seed(seeds[0] % 2**31))
    before = logits.clone()
    positions = [3 * i for i in range(len(seeds))]
    together = Draw(made, width, CPU)(logits, positions)
    alone = [Draw(made[i : i + 1], width, CPU)(logits[i : i + 1], positions[i : i + 1]) for i in range(len(seeds))]
    assert together.tolist() == [int(token) for token in alone]
    assert torch.equal(logits, before)
    weights = weigh(logits, torch.ones(len(seeds), 1))
    assert all(torch.equal(weights[i], weights_of(logits[i].clone())) for i in range(len(seeds)))
