"""The distribution that tokens are drawn from, and its truncations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.serve import draw
from moeforge.serve.draw import Draw, greatest, keep
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams

V = 40
LOGITS = st.integers(0, 2**31).map(lambda seed: torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3)
CPU = torch.device("cpu")


def requests(*params: dict[str, Any]) -> list[Request]:
    return [Request(str(i), None, [1], SamplingParams(**p), 9) for i, p in enumerate(params)]


def limits(min_p: float = 0, top_k: int = 10**6, top_p: float = 1) -> tuple[torch.Tensor, ...]:
    return torch.tensor([[min_p]]), torch.tensor([[top_k]]), torch.tensor([[top_p]])


def kept(logits: torch.Tensor, temperature: float = 1, width: int | None = None, **given: Any) -> torch.Tensor:
    """Probabilities after truncation, by token."""
    p, tokens, certain = keep((logits / temperature).softmax(-1)[None], *limits(**given), width=width)
    assert certain.all()
    return torch.zeros(len(logits)).scatter(0, tokens[0], p[0])


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


@given(LOGITS, st.floats(0.01, 0.5), st.floats(0.05, 0.95))
def test_top_p_counts_what_min_p_left(logits: torch.Tensor, min_p: float, top_p: float) -> None:
    p = logits.softmax(0)
    only_inside = logits.where(p >= min_p * p.max(), -math.inf)
    assert torch.equal(kept(logits, min_p=min_p, top_p=top_p) > 0, kept(only_inside, top_p=top_p) > 0)


@given(st.integers(1, 5))
def test_ties_go_to_the_lower_token(k: int) -> None:
    assert torch.equal(kept(torch.zeros(V), top_k=k).nonzero().flatten(), torch.arange(k))


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.6, 2.0, 5.0]), min_size=V, max_size=V),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1, 2, 5, 8, 12, 10**6]),
    st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_narrow_look_is_the_same_or_not_certain(values: list[float], min_p: float, top_k: int, top_p: float) -> None:
    p = torch.tensor(values).softmax(0)[None]
    whole, tokens, _ = keep(p, *limits(min_p, top_k, top_p))
    narrow, some, certain = keep(p, *limits(min_p, top_k, top_p), width=8)
    if certain:
        assert torch.equal(narrow[0], whole[0, :8]) and not whole[0, 8:].any()
        assert torch.equal(some[0][narrow[0] > 0], tokens[0][whole[0] > 0])


def test_a_narrow_look_is_mostly_certain() -> None:
    for given_limits in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 6}):
        logits = torch.randn(V, generator=torch.Generator().manual_seed(1)) * 4
        assert torch.equal(kept(logits, width=16, **given_limits), kept(logits, **given_limits))


def test_draws_are_the_same_however_many_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(60, V, generator=generator) * torch.rand(60, 1, generator=generator) * 5
    some = [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {}, {"top_p": 0.99, "min_p": 0.001}, {"top_k": 30}]
    made = requests(*({"seed": i, **some[i % len(some)]} for i in range(60)))
    positions = torch.arange(60)
    wide = Draw(made, V, CPU)(logits, positions)
    monkeypatch.setattr(draw, "_NARROW", 8)
    assert torch.equal(Draw(made, V, CPU)(logits, positions), wide)


def test_draws_follow_the_probabilities() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 2.0, -1.0, -math.inf]), 5000
    params = {"temperature": 0.7, "seed": 11}
    one = Draw(requests(params), 5, CPU)
    tokens = torch.cat([one(logits[None], torch.tensor([position])) for position in range(2000)])
    many = Draw(requests(*({**params, "seed": seed} for seed in range(draws))), 5, CPU)
    across = many(logits.expand(draws, -1), torch.full((draws,), 5))
    p = (logits / 0.7).softmax(0)
    for sample in (tokens, across):
        share = torch.bincount(sample, minlength=5) / len(sample)
        bound = 4.5 * (p * (1 - p) / len(sample)).sqrt()
        assert ((share - p).abs() <= bound).all(), (share, p)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6, unique=True), st.data())
def test_a_draw_depends_on_its_own_seed_position_and_logits_only(seeds: list[int], data: st.DataObject) -> None:
    pool = [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1, "top_k": 9}]
    made = requests(*({"seed": seed, **data.draw(st.sampled_from(pool))} for seed in seeds))
    logits = torch.randn(len(seeds), V, generator=torch.Generator().manual_seed(seeds[0] % 2**31))
    positions = torch.arange(len(seeds)) * 3
    together = Draw(made, V, CPU)(logits, positions)
    alone = [Draw(made[i : i + 1], V, CPU)(logits[i : i + 1], positions[i : i + 1]) for i in range(len(seeds))]
    assert together.tolist() == [int(token) for token in alone]


@settings(max_examples=60)
@given(st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.data())
def test_the_greatest_is_the_first_of_the_greatest(width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    x = torch.randint(0, data.draw(st.sampled_from([2, 50, 10**6])), (4, width),
                      generator=torch.Generator().manual_seed(seed)).to(dtype)  # fmt: skip
    bad = data.draw(st.integers(0, width - 1))
    x[1, bad] = math.nan
    x[2, bad] = math.inf
    x[3] = -math.inf
    values, tokens = greatest(x)
    assert values[0] == x[0].max() and tokens[0] == (x[0] == x[0].max()).nonzero()[0, 0]
    assert values[1].isnan() and values[2] == math.inf and tokens[2] == bad and values[3] == -math.inf
