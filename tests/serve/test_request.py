"""Text, stop strings and ends of one request."""

from __future__ import annotations

from typing import Any

from moeforge.serve import SamplingParams
from moeforge.serve.request import Request

END = 257


def run(tokenizer: Any, text: str, **params: Any) -> tuple[Request, list[str]]:
    """Feed the text's bytes one by one until the request ends; the texts seen on the way."""
    request = Request("p", [80], SamplingParams(max_tokens=100, **params), 100, {END}, tokenizer)
    seen = []
    for token in tokenizer(text)["input_ids"]:
        request.append(token)
        seen.append(request.text())
        if request.finish_reason is not None:
            break
    return request, seen


def test_half_a_character_is_never_shown(tokenizer: Any) -> None:
    text = "naïve 日本 🙂!"
    request, seen = run(tokenizer, text)
    assert seen[-1] == text
    assert all(text.startswith(part) for part in seen)
    assert seen[2:4] == ["na", "naï"]
    assert request.finish_reason is None


def test_a_stop_string_ends_the_text_before_itself(tokenizer: Any) -> None:
    request, seen = run(tokenizer, "one STOP two", stop=["ST", "zebra", "STOP"])
    assert request.finish_reason == "stop"
    assert request.text() == "one "
    assert len(request.token_ids) == len("one ST")
    assert all("one ".startswith(part) for part in seen)


def test_the_beginning_of_a_stop_string_waits(tokenizer: Any) -> None:
    _, seen = run(tokenizer, "a##b###c", stop="###")
    assert seen == ["a", "a", "a", "a##b", "a##b", "a##b", "a##b"]


def test_the_earliest_stop_string_counts(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "xaby", stop=["b", "ab"])
    assert request.text() == "x"


def test_an_end_token_is_kept_but_not_shown(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "ab</s>cd")
    output = request.output()
    assert output.finished and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == "ab"
    assert output.outputs[0].token_ids[-1] == END and len(output.outputs[0].token_ids) == 3


def test_room_ends_it(tokenizer: Any) -> None:
    request = Request(None, [80], SamplingParams(), 2, {END}, tokenizer)
    request.append(70)
    assert not request.output().finished
    request.append(71)
    assert request.finish_reason == "length"
