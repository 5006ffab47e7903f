"""The sampler's distribution, its truncations, and its independence of batch and order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.serve import SamplingParams
from moeforge.serve.sampling import Sampler, exponential_noise

V = 40
LOGITS = st.integers(0, 2**31).map(lambda seed: torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3)


def kept(logits: torch.Tensor, **params: Any) -> torch.Tensor:
    """Probabilities after truncation."""
    return Sampler([SamplingParams(**params)]).probabilities(logits[None])[0]


@given(LOGITS, st.integers(1, V + 5), st.floats(0.3, 3))  # colder, the least likely underflow to zero
def test_top_k_keeps_the_k_likeliest(logits: torch.Tensor, k: int, temperature: float) -> None:
    p = kept(logits, top_k=k, temperature=temperature)
    full = (logits / temperature).softmax(0)
    chosen = p > 0
    assert chosen.sum() == min(k, V)
    assert torch.equal(p[chosen], full[chosen])
    assert chosen.all() or full[chosen].min() >= full[~chosen].max()


@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_sum_to_p(logits: torch.Tensor, top_p: float) -> None:
    full = logits.softmax(0)
    p = kept(logits, top_p=top_p)
    chosen = p > 0
    assert full[chosen].sum() >= top_p - 1e-5
    assert full[chosen].sum() - full[chosen].min() < top_p + 1e-5
    assert chosen.all() or full[chosen].min() >= full[~chosen].max()


@given(LOGITS, st.floats(0.01, 1))
def test_min_p_is_relative_to_the_likeliest(logits: torch.Tensor, min_p: float) -> None:
    full = logits.softmax(0)
    assert torch.equal(kept(logits, min_p=min_p) > 0, full >= min_p * full.max())


@given(LOGITS, st.integers(1, 20), st.floats(0.05, 0.95))
def test_top_p_counts_what_top_k_left(logits: torch.Tensor, k: int, top_p: float) -> None:
    inside = logits.topk(k).indices
    only_inside = torch.full((V,), -math.inf)
    only_inside[inside] = logits[inside]
    assert torch.equal(kept(logits, top_k=k, top_p=top_p) > 0, kept(only_inside, top_p=top_p) > 0)


@given(st.integers(1, 5))
def test_ties_go_to_the_lower_token(k: int) -> None:
    assert torch.equal(kept(torch.zeros(V), top_k=k).nonzero().flatten(), torch.arange(k))


def test_draws_follow_the_probabilities() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0, -math.inf]), 40_000
    sampler = Sampler([SamplingParams(temperature=0.7, seed=11)])
    tokens = torch.cat([sampler(logits[None], torch.tensor([position])) for position in range(2000)])
    many = Sampler([SamplingParams(temperature=0.7, seed=seed) for seed in range(draws)])
    across = many(logits.expand(draws, -1), torch.full((draws,), 5))
    p = (logits / 0.7).softmax(0)
    for sample in (tokens, across):
        share = torch.bincount(sample, minlength=5) / len(sample)
        bound = 4.5 * (p * (1 - p) / len(sample)).sqrt()
        assert ((share - p).abs() <= bound).all(), (share, p)


def test_noise_is_exponential_and_independent() -> None:
    noise = exponential_noise(torch.arange(200), torch.full((200,), 3), 2000)
    assert noise.dtype == torch.float32 and (noise > 0).all()
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    levels = torch.tensor([1e-4, 0.01, 0.1, 0.5, 2.0])
    shares = (noise.flatten()[:, None] < levels).double().mean(0)
    torch.testing.assert_close(shares, 1 - torch.exp(-levels.double()), rtol=0.35, atol=2e-3)
    for other in (
        noise.roll(1, 0),
        noise.roll(1, 1),
        exponential_noise(torch.arange(200), torch.full((200,), 4), 2000),
    ):
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.01


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6, unique=True), st.data())
def test_a_draw_depends_on_its_own_seed_position_and_logits_only(seeds: list[int], data: st.DataObject) -> None:
    pool = [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1, "top_k": 9}]
    options = [data.draw(st.sampled_from(pool)) for _ in seeds]
    params = [SamplingParams(seed=seed, **option) for seed, option in zip(seeds, options, strict=True)]
    logits = torch.randn(len(seeds), V, generator=torch.Generator().manual_seed(seeds[0] % 2**31))
    positions = torch.arange(len(seeds)) * 3
    together = Sampler(params)(logits, positions)
    alone = [Sampler(params[i : i + 1])(logits[i : i + 1], positions[i : i + 1]) for i in range(len(seeds))]
    assert together.tolist() == [int(token) for token in alone]


def test_greedy_beside_sampled() -> None:
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=0), SamplingParams(temperature=5.0, seed=0)]
    tokens = torch.stack([Sampler(params)(logits, torch.tensor([i, i])) for i in range(50)])
    assert (tokens[:, 0] == logits[0].argmax()).all()
    assert len(tokens[:, 1].unique()) > 5


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.zeros(4, V)
    logits[1, 3] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0, top_k=3)):
        assert (Sampler([params] * 4)(logits, torch.arange(4)) < 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -2),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2.0), ("max_tokens", 0),
        ("stop", ["a", ""]),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name} = "):
        SamplingParams(**{name: value})
