"""Texts that follow a JSON schema, and schemas that are made to hurt."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from moeforge.errors import UserError
from moeforge.serve import grammar as grammar_module
from moeforge.serve.grammar import Grammar, compile_grammar
from moeforge.serve.outputs import Sampled
from moeforge.serve.request import Request
from moeforge.serve.sampler import Sampler
from moeforge.serve.sampling_params import SamplingParams, StructuredOutputsParams

V = 264  # 6 more than the tokenizer has
END = 257


def compiled(tokenizer: Any, schema: Any) -> Grammar:
    return compile_grammar(StructuredOutputsParams(json=schema), tokenizer, V, {END})


def allowed(grammar: Grammar) -> list[int]:
    return np.unpackbits(np.frombuffer(grammar.mask(), np.uint8), bitorder="little").nonzero()[0].tolist()


def random_text(tokenizer: Any, grammar: Grammar, seed: int, room: int = 600) -> Request:
    """What a model that knows nothing writes."""
    params = SamplingParams(seed=seed, max_tokens=None)
    request = Request("r", None, [1], params, room, {END}, tokenizer, grammar=grammar.copy())
    sampler, generator = Sampler(V), torch.Generator().manual_seed(seed)
    while request.finish_reason is None:
        request.append(sampler(torch.randn(1, V, generator=generator), [request])[0])
    return request


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    name, tags = value["name"], value["tags"]
    return (
        set(value) == {"name", "age", "tags"}
        and name[0].isupper() and name[1:].islower() and 2 <= len(name) <= 9
        and isinstance(value["age"], int) and 0 <= value["age"] <= 150
        and 1 <= len(tags) <= 3 and all(tag in ("a", "b", 3, None) for tag in tags)
    )  # fmt: skip


def test_random_models_write_what_the_schema_says(tokenizer: Any) -> None:
    grammar = compiled(tokenizer, PERSON)
    finished = 0
    for seed in range(12):
        request = random_text(tokenizer, grammar, seed)
        if request.finish_reason == "stop":
            finished += 1
            assert is_person(json.loads(request.output().text)), request.output().text
        else:
            assert request.finish_reason == "length" and request.num_output_tokens == 600
    assert finished >= 10


def test_any_object(tokenizer: Any) -> None:
    grammar = compile_grammar(StructuredOutputsParams(json_object=True), tokenizer, V, {END})
    assert bytes(allowed(grammar)) and {chr(33 + token) for token in allowed(grammar)} == {"{"}
    texts = [random_text(tokenizer, grammar, seed) for seed in range(12)]
    done = [request.output().text for request in texts if request.finish_reason == "stop"]
    assert len(done) >= 4 and all(isinstance(json.loads(text), dict) for text in done)


def test_only_the_end_follows_a_complete_text(tokenizer: Any) -> None:
    grammar = compiled(tokenizer, {"type": "integer", "minimum": 1, "maximum": 99})
    for token in tokenizer("1")["input_ids"]:
        assert grammar.accept(token)
    assert END in allowed(grammar) and len(allowed(grammar)) == 11 and not grammar.finished
    assert grammar.accept(tokenizer("2")["input_ids"][0])
    assert grammar.finished and allowed(grammar) == [END]


def test_a_request_ends_with_its_text(tokenizer: Any) -> None:
    grammar = compiled(tokenizer, {"const": "ab"})
    request = Request("r", None, [1], SamplingParams(ignore_eos=True), 4, {END}, tokenizer, grammar=grammar)
    for token in tokenizer('"ab"')["input_ids"]:
        request.append(Sampled(token))
    assert (request.finish_reason, request.stop_reason, request.output().text) == ("stop", None, '"ab"')


def test_copies_go_on_alone(tokenizer: Any) -> None:
    grammar = compiled(tokenizer, {"enum": ["ab", "cd"]})
    first, second = grammar.copy(), grammar.copy()
    for token in tokenizer('"ab"')["input_ids"]:
        assert first.accept(token)
    for token in tokenizer('"cd"')["input_ids"]:
        assert second.accept(token)
    assert first.finished and second.finished and not grammar.finished


def test_a_token_that_is_not_allowed_aborts(tokenizer: Any) -> None:
    request = Request(
        "r", None, [1], SamplingParams(), 9, {END}, tokenizer, grammar=compiled(tokenizer, {"type": "null"})
    )
    request.append(Sampled(tokenizer("x")["input_ids"][0]))
    delta = request.take_delta()
    assert (delta.finish_reason, delta.sampled, request.num_output_tokens) == ("abort", (), 0)
    assert str(delta.stop_reason).startswith("structured_outputs: ") and "\n" not in str(delta.stop_reason)


def test_a_text_that_exceeds_the_limits_aborts_its_request_alone(tokenizer: Any) -> None:
    grammar = compiled(tokenizer, {"type": "string", "pattern": "^([a-z]{1,1000}){1,1000}$"})
    request = Request("r", None, [1], SamplingParams(temperature=0), 99, {END}, tokenizer, grammar=grammar)
    other = Request("o", None, [1], SamplingParams(temperature=0), 99, {END}, tokenizer)
    sampler = Sampler(V)
    while request.finish_reason is None:
        for one, sampled in zip((request, other), sampler(torch.zeros(2, V), (request, other)), strict=True):
            one.append(sampled)
    if request.finish_reason == "abort":
        assert "structured_outputs: lexer error" in str(request.stop_reason)
    assert other.finish_reason is None


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def strings(patterns: list[str]) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(nested(50), id="nesting"),
        pytest.param({"enum": [f"v{i}" for i in range(6000)]}, id="enum"),
        pytest.param({"type": "string", "pattern": "^(a|b)*a(a|b){30}$"}, id="states"),
        pytest.param({"type": "string", "pattern": "(a*)*" * 20 + "b"}, id="stars"),
        pytest.param({"type": "string", "minLength": 10**6, "maxLength": 10**9}, id="length"),
        pytest.param({"type": "array", "minItems": 10**6, "maxItems": 10**9}, id="items"),
        pytest.param({"properties": {"c": {"$ref": "#"}}, "type": "object"}, id="recursion"),
    ],
)
def test_large_schemas_that_are_fine(tokenizer: Any, schema: dict[str, Any]) -> None:
    grammar = compiled(tokenizer, schema)
    start = time.monotonic()
    random_text(tokenizer, grammar, 0, room=20)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        pytest.param(nested(300), "recursion limit|too deeply", id="nesting"),
        pytest.param({"$ref": "http://127.0.0.1:9/x.json"}, "does not fetch", id="remote"),
        pytest.param({"$ref": "file:///etc/passwd"}, "does not fetch", id="file"),
        pytest.param({"$ref": "#"}, "nothing can satisfy it", id="itself"),
        pytest.param({"type": "banana"}, "banana", id="type"),
        pytest.param({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable", id="empty"),
        pytest.param({"not": {"type": "string"}}, "Unimplemented", id="not"),
        pytest.param({"type": "string", "pattern": "("}, "regex parse error", id="pattern"),
        pytest.param({"maximum": 10**400}, "number out of range", id="number"),
        pytest.param({"type": "integer", "multipleOf": 999983}, "too complex", id="multiple"),
        pytest.param(strings([f"^(.{{{n}}})*x$" for n in (97, 101, 103, 107)]), "too complex", id="product"),
        pytest.param(
            {"type": "object", "patternProperties": {f"^{i:03d}.{{{i + 100}}}$": {} for i in range(600)}},
            "too complex",
            id="pairs",
        ),
        pytest.param(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}, "type": "object"} for j in range(4)]}
                       for i in range(12)]},
            "too large",
            id="product of choices",
        ),
    ],
)  # fmt: skip
def test_schemas_that_are_refused_in_time(tokenizer: Any, schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"^structured_outputs: .*({reason})") as refused:
        compiled(tokenizer, schema)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_the_tokenizer_is_wrapped_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(tokenizer, {"type": "null"})

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("wrapped or tried again")

    monkeypatch.setattr("llguidance.hf.from_tokenizer", fail)
    monkeypatch.setattr(grammar_module.subprocess, "run", fail)
    compiled(tokenizer, {"type": "null"})


def test_what_is_missing_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = StructuredOutputsParams(json_object=True)
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        compile_grammar(wanted, None, V)
    with pytest.raises(UserError, match="tokenizer is not supported"):
        compile_grammar(wanted, type("Slow", (), {"eos_token_id": 2, "__len__": lambda self: 9})(), V)
    assert compile_grammar(wanted, tokenizer, V).ends == {END}
    monkeypatch.setitem(sys.modules, "moeforge.serve.schema_check", None)
    with pytest.raises(UserError, match=r"llguidance is not installed; pip install 'moeforge\[serve\]'"):
        compile_grammar(wanted, tokenizer, V)
