"""What requests may ask for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from moeforge.errors import UserError
from moeforge.serve.sampling_params import SamplingParams, StructuredOutputsParams

NAN, INF, HUGE = math.nan, math.inf, 10**5000


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 129, True, 1.0, "1", None, HUGE]),
        ("temperature", [-0.1, 101, NAN, INF, True, "1", None, HUGE]),
        ("top_k", [-2, 1.5, False, "5", None]),
        ("top_p", [0, 0.0, 1.1, 2, -1, NAN, True, None]),
        ("min_p", [-0.1, 2.0, NAN, False, None]),
        ("presence_penalty", [-2.1, 2.1, NAN, INF, True]),
        ("frequency_penalty", [-2.1, 2.1, NAN, "0"]),
        ("repetition_penalty", [0, -1, 0.001, 101, INF, NAN, None]),
        ("seed", [1.5, True, "x", -(2**63) - 1, 2**64, HUGE]),
        ("stop", [["a", ""], "", ["x"] * 17, "x" * 257, [1], 5, {"a": 1}, [None], b"a"]),
        ("stop_token_ids", [[-1], [True], [1.0], "12", 5, [0] * 257, {1: 2}]),
        ("ignore_eos", [1, None, "yes"]),
        ("max_tokens", [0, -1, True, 1.0, "16"]),
        ("min_tokens", [-1, True, 1.0, None]),
        ("logprobs", [-1, 21, True, 1.0, "1"]),
        ("logit_bias", [{"1": 1.0}, {-1: 1}, {True: 1}, {1: 101}, {1: -101}, {1: NAN}, {1: "x"}, {1: True}, [1], 5,
                        dict.fromkeys(range(1025), 1), {HUGE: HUGE}]),
        ("structured_outputs", [{"json": {}}, "{}", True]),
    ],
)  # fmt: skip
def test_impossible_parameters_are_refused_in_one_line(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name}( = |: )") as refused:
            SamplingParams(**{name: value})
        text = str(refused.value)
        assert "must" in text and "\n" not in text and len(text) < 200


def test_messages_name_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"^top_p = 2: must be above 0 and at most 1$"):
        SamplingParams(top_p=2)
    with pytest.raises(UserError, match=r"^min_tokens = 20: must be at most max_tokens = 16$"):
        SamplingParams(min_tokens=20)
    with pytest.raises(UserError, match=r"^max_tokens = 0: must be an integer, at least 1$"):
        SamplingParams(max_tokens=0)


def test_what_is_allowed() -> None:
    params = SamplingParams(
        n=128, temperature=0, top_k=10**6, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=2, seed=-(2**63), stop="x", stop_token_ids=[1, 2], max_tokens=None, min_tokens=5, logprobs=0,
        logit_bias={5: -100, 6: 3},
    )  # fmt: skip
    assert params.greedy and params.truncates and params.penalizes
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("x",), (1, 2), {5: -100.0, 6: 3.0})
    assert isinstance(params.top_p, float)
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert not (params.greedy or params.truncates or params.penalizes)


def test_token_ids_are_checked_against_a_vocabulary() -> None:
    SamplingParams(stop_token_ids=[99], logit_bias={0: 1}).check(100)
    for name, value in (("stop_token_ids", [5, 100]), ("logit_bias", {100: 1.0}), ("stop_token_ids", [HUGE])):
        with pytest.raises(UserError, match=f"^{name}: has token .*; must be between 0 and 99$"):
            SamplingParams(**{name: value}).check(100)  # type: ignore[arg-type]


def test_structured_outputs() -> None:
    assert json.loads(StructuredOutputsParams(json={"type": "string"}).schema) == {"type": "string"}
    assert StructuredOutputsParams(json='{"type": "string"}').schema == '{"type": "string"}'
    assert json.loads(StructuredOutputsParams(json_object=True).schema) == {"type": "object"}
    # The order of keys is the order in which they are written.
    assert list(json.loads(StructuredOutputsParams(json={"b": 1, "a": 2}).schema)) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"json": {}, "json_object": True}, "exactly one"),
        ({"json_object": 1}, "true or false"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": [1]}, "must be an object"),
        ({"json": {"a": NAN}}, "not JSON"),
        ({"json": {"a": {1}}}, "not JSON"),
        ({"json": {"enum": ["x" * 70000]}}, "at most 65536"),
        ({"json": '{"description": "' + "é" * 40000 + '"}'}, "at most 65536"),
        ({"json": '{"a":' * 10000 + "1" + "}" * 10000}, "nested too deeply"),
        ({"json": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json": '{"maximum": ' + "9" * 5000 + "}"}, "not JSON"),
    ],
)
def test_structured_outputs_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^structured_outputs.*{message}") as refused:
        StructuredOutputsParams(**given)
    assert "\n" not in str(refused.value)
