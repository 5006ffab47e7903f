"""A batch of requests, each with its own parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.errors import RunError
from moeforge.serve.grammar import compile_grammar
from moeforge.serve.outputs import Sampled
from moeforge.serve.request import Request
from moeforge.serve.sampler import Sampler, greatest
from moeforge.serve.sampling_params import SamplingParams, StructuredOutputsParams

V = 264
END = 257
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.4},
    {"logit_bias": {5: 20.0, 6: -100.0}, "logprobs": 0},
    {"top_k": 7, "presence_penalty": 1.0},
    {"top_p": 0.8, "min_tokens": 4, "logprobs": 20},
    {"min_p": 0.1},
    {},
]


def request(seed: int = 0, prompt: tuple[int, ...] = (1, 2), **params: Any) -> Request:
    return Request(str(seed), None, list(prompt), SamplingParams(seed=seed, max_tokens=None, **params), 10**6, {END})


def logits_of(request: Request, scale: float = 3) -> torch.Tensor:
    """A model of one's own: logits that depend on the request's tokens alone."""
    seed = hash((request.request_id, *request.all_token_ids)) % 2**31
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale


def step(sampler: Sampler, requests: list[Request], model: Callable[[Request], torch.Tensor] = logits_of) -> None:
    for one, sampled in zip(requests, sampler(torch.stack([model(r) for r in requests]), requests), strict=True):
        one.append(sampled)


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(3, V)
    requests = [request(i, temperature=0) for i in range(3)]
    assert Sampler(V)(logits, requests) == [Sampled(token) for token in logits.argmax(-1).tolist()]
    wider = torch.cat([logits, torch.full((3, 8), 99.0)], -1)  # rows of the head that are no tokens
    assert Sampler(V)(wider, requests) == Sampler(V)(logits, requests)


def test_greedy_beside_drawn() -> None:
    sampler, requests = Sampler(V), [request(0, temperature=0), request(1, temperature=5.0)]
    logits = torch.randn(2, V)
    for _ in range(50):
        for one, sampled in zip(requests, sampler(logits, requests), strict=True):
            one.append(sampled)
    assert set(requests[0].output_token_ids) == {int(logits[0].argmax())}
    assert len(set(requests[1].output_token_ids)) > 5


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_request_alone_gets_what_it_gets_in_any_company(data: st.DataObject) -> None:
    """The batch changes from step to step; every request ends with the tokens that it gets alone."""
    options = data.draw(st.lists(st.sampled_from(OPTIONS), min_size=2, max_size=6))
    together = [request(i, **option) for i, option in enumerate(options)]
    sampler = Sampler(V)
    for _ in range(12):
        batch = data.draw(st.lists(st.sampled_from(together), min_size=1, unique=True))
        batch = [one for one in batch if one.finish_reason is None]
        if batch:
            step(sampler, batch)
    for i, option in enumerate(options):
        alone, sampler = request(i, **option), Sampler(V)
        for _ in range(together[i].num_output_tokens):
            step(sampler, [alone])
        assert alone.output() == together[i].output()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_that_are_not_finite_are_a_fault(option: dict[str, Any], bad: float) -> None:
    requests = [request(0, temperature=0), request(1, **option)]
    logits = torch.zeros(2, V)
    Sampler(V)(logits, requests)
    logits[1, 3] = bad
    with pytest.raises(RunError, match="not finite"):
        Sampler(V)(logits, requests)
    logits[1] = -math.inf
    with pytest.raises(RunError, match="not finite"):
        Sampler(V)(logits, requests)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    requests = [
        request(0, temperature=0),
        request(1, temperature=0, logprobs=0),
        request(2, temperature=0.1, top_k=1, logprobs=2, logit_bias={7: 100.0}),  # far from likely
        request(3, temperature=0, logprobs=20, repetition_penalty=2.0),
        request(4, temperature=0, logprobs=3),
    ]
    sampled = Sampler(V)(logits, requests)
    assert torch.equal(logits, before)
    own = logits.float().log_softmax(-1)
    assert sampled[0] == Sampled(int(logits[0].argmax()))
    assert sampled[2].token == 7
    for row, count in ((1, 0), (2, 2), (3, 20), (4, 3)):
        token, logprob, top = sampled[row]
        assert logprob == own[row, token].item() and top is not None
        expected = dict(zip(own[row].topk(count).indices.tolist(), own[row].topk(count).values.tolist(), strict=True))
        assert top == expected | {token: logprob}
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_logit_bias_forces_and_forbids() -> None:
    logits = torch.randn(2, V)
    best = int(logits[0].argmax())
    requests = [request(0, temperature=0, logit_bias={best: -100}), request(1, logit_bias={9: 100})]
    sampled = Sampler(V)(logits, requests)
    assert sampled[0].token == int(logits[0].topk(2).indices[1])
    assert sampled[1].token == 9


def test_repetition_penalty_counts_the_prompt_and_the_others_do_not() -> None:
    logits = torch.zeros(1, V)
    logits[0, 1], logits[0, 50] = 1.0, 0.9
    for params, token in (({"repetition_penalty": 1.5}, 50), ({"presence_penalty": 2}, 1)):
        assert Sampler(V)(logits, [request(0, temperature=0, **params)])[0].token == token
    one, sampler = request(0, temperature=0, presence_penalty=2.0), Sampler(V)
    for expected in (1, 50, 0, 2, 3):
        one.append(sampler(logits, [one])[0])
        assert one.output_token_ids[-1] == expected


def test_min_tokens_puts_off_the_end() -> None:
    def wants_to_end(request: Request) -> torch.Tensor:
        return torch.zeros(V).index_fill(0, torch.tensor([END, 9]), 5.0).index_fill(0, torch.tensor([END]), 9.0)

    requests = [request(i, temperature=0, min_tokens=i, stop_token_ids=[9]) for i in range(4)]
    sampler = Sampler(V)
    while running := [one for one in requests if one.finish_reason is None]:
        step(sampler, running, wants_to_end)
    assert [one.num_output_tokens for one in requests] == [1, 2, 3, 4]
    assert all(one.output_token_ids[:-1] == [0] * i for i, one in enumerate(requests))


def test_structured_and_free_requests_in_one_batch(tokenizer: Any) -> None:
    wanted = StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
            "required": ["name", "ok"],
            "additionalProperties": False,
        }
    )
    grammar = compile_grammar(wanted, tokenizer, V, {END})
    requests = [
        Request(str(i), None, [1], SamplingParams(seed=i, max_tokens=None, **params), 400, {END}, tokenizer,
                grammar=grammar.copy() if "structured_outputs" in params else None)
        for i, params in enumerate(
            [{"structured_outputs": wanted}, {}, {"structured_outputs": wanted, "temperature": 0, "min_tokens": 90},
             {"structured_outputs": wanted, "logprobs": 1, "repetition_penalty": 1.3}] * 2
        )
    ]  # fmt: skip
    sampler = Sampler(V)
    while running := [one for one in requests if one.finish_reason is None]:
        step(sampler, running, lambda one: logits_of(one, 1))
    for i, one in enumerate(requests):
        assert one.finish_reason in ("stop", "length")
        if i % 4 != 1 and one.finish_reason == "stop":
            value = json.loads(one.output().text)
            assert set(value) == {"name", "ok"} and len(value["name"]) <= 5 and isinstance(value["ok"], bool)
    assert sum(one.finish_reason == "stop" for i, one in enumerate(requests) if i % 4 != 1) >= 5


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
