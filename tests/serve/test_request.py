"""Text, stop strings and ends of one request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.serve.outputs import CompletionDelta, Sampled
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams

END = 257


def new(tokenizer: Any, room: int = 100, **params: Any) -> Request:
    return Request("r", "p", [80], SamplingParams(max_tokens=None, **params), room, {END}, tokenizer)


def run(tokenizer: Any, text: str, room: int = 100, **params: Any) -> tuple[Request, list[CompletionDelta]]:
    """Feed the text's bytes one by one until the request ends; what each brought."""
    request = new(tokenizer, room, **params)
    deltas = []
    for token in tokenizer(text)["input_ids"]:
        request.append(Sampled(token))
        deltas.append(request.take_delta())
        if request.finish_reason is not None:
            break
    assert "".join(delta.text for delta in deltas) == request.output().text
    assert [s.token for delta in deltas for s in delta.sampled] == request.output_token_ids
    assert request.all_token_ids == [80, *request.output_token_ids]
    return request, deltas


def test_half_a_character_is_never_shown(tokenizer: Any) -> None:
    request, deltas = run(tokenizer, "naïve 日本")
    assert [delta.text for delta in deltas] == ["n", "a", "", "ï", "v", "e", " ", "", "", "日", "", "", "本"]
    assert request.finish_reason is None


def test_what_is_left_of_a_character_comes_at_the_end(tokenizer: Any) -> None:
    request, deltas = run(tokenizer, "a日", room=3)
    assert request.finish_reason == "length"
    assert deltas[-1].text == "\N{REPLACEMENT CHARACTER}"
    request = new(tokenizer)
    request.append(Sampled(tokenizer("日")["input_ids"][0]))
    request.abort()
    delta = request.take_delta()
    assert (delta.text, delta.finish_reason, len(delta.sampled)) == ("\N{REPLACEMENT CHARACTER}", "abort", 1)
    request.abort()
    assert request.take_delta() == CompletionDelta(0, "", (), "abort")


def test_a_stop_string_ends_the_text_before_itself(tokenizer: Any) -> None:
    request, deltas = run(tokenizer, "one STOP two", stop=["ST", "zebra", "STOP"])
    output = request.output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("one ", "stop", "ST")
    assert len(output.token_ids) == len("one ST")
    assert deltas[-1].stop_reason == "ST" and deltas[-1].finish_reason == "stop"


def test_the_beginning_of_a_stop_string_waits(tokenizer: Any) -> None:
    _, deltas = run(tokenizer, "a##b###c", stop="###")
    assert [delta.text for delta in deltas] == ["a", "", "", "##b", "", "", ""]
    request, deltas = run(tokenizer, "a##", stop="###", room=3)  # it comes if nothing follows
    assert deltas[-1].text == "##" and request.finish_reason == "length"


def test_of_stop_strings_complete_at_once_the_longest_counts(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "xaby", stop=["b", "ab"])
    assert (request.output().text, request.stop_reason) == ("x", "ab")


def test_a_stop_string_at_the_last_token_is_the_reason(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "ab", stop="b", room=2)
    assert (request.finish_reason, request.output().text) == ("stop", "a")


def test_a_stop_string_that_the_end_completes(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "a日", stop="\N{REPLACEMENT CHARACTER}", room=2)
    assert (request.finish_reason, request.output().text) == ("stop", "a")


def test_min_tokens_lets_stop_strings_pass(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "a.b.c.", stop=".", min_tokens=2)
    assert request.output().text == "a.b"
    request, _ = run(tokenizer, "a--b", stop="--", min_tokens=2)  # begun before, complete after
    assert request.output().text == "a"
    request, _ = run(tokenizer, "--a--", stop="--", min_tokens=2)
    assert request.output().text == "--a"


def test_an_end_token_is_kept_but_not_shown(tokenizer: Any) -> None:
    request, deltas = run(tokenizer, "ab</s>cd")
    output = request.output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", None)
    assert output.token_ids[-1] == END and len(output.token_ids) == 3
    assert [delta.text for delta in deltas] == ["a", "b", ""]


def test_stop_tokens_are_named(tokenizer: Any) -> None:
    b = tokenizer("b")["input_ids"][0]
    request, _ = run(tokenizer, "abc", stop_token_ids=[b])
    assert (request.output().text, request.finish_reason, request.stop_reason) == ("a", "stop", b)
    request, _ = run(tokenizer, "a</s>", stop_token_ids=[END])
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    request, _ = run(tokenizer, "a</s>b", stop_token_ids=[END], ignore_eos=True)
    assert (request.finish_reason, request.stop_reason) == ("stop", END)


def test_ignore_eos(tokenizer: Any) -> None:
    request, _ = run(tokenizer, "a</s>b", ignore_eos=True)
    assert (request.output().text, request.finish_reason) == ("ab", None)
    assert request.ends == frozenset()


def test_room_ends_it_without_a_tokenizer_too() -> None:
    request = Request("r", None, [80], SamplingParams(), 2, {END})
    request.append(Sampled(70))
    assert request.finish_reason is None
    request.append(Sampled(71))
    output = request.output()
    assert (output.finish_reason, output.text, output.token_ids) == ("length", "", [70, 71])
    assert request.num_tokens == 3 and request.num_output_tokens == 2


def test_logprobs_are_kept_where_asked_for(tokenizer: Any) -> None:
    sampled = [Sampled(70, -0.5, {70: -0.5}), Sampled(71, -1.5, {70: -0.1, 71: -1.5})]
    for params, expected in ((SamplingParams(logprobs=1), sampled), (SamplingParams(), None)):
        request = Request("r", None, [80], params, 9, (), tokenizer)
        for one in sampled:
            request.append(one)
        assert request.output().logprobs == expected
        assert request.take_delta().sampled == tuple(sampled)


def test_continuations_of_a_prompt_draw_apart_but_repeatably() -> None:
    def key(seed: int | None, index: int) -> int:
        return Request("r", None, [1], SamplingParams(n=2, seed=seed), 9, index=index).noise_key

    assert key(3, 0) != key(3, 1)
    assert key(3, 1) == key(3, 1)
    assert key(None, 0) != key(None, 0)


def test_a_request_is_itself() -> None:
    one, other = (Request("r", None, [1], SamplingParams(seed=1), 9) for _ in range(2))
    assert one != other and len({one, other}) == 2
    assert one.all_token_ids is not one.prompt_token_ids


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(UserError, match="^stop: needs"):
        Request("r", None, [1], SamplingParams(stop="x"), 9)


@given(st.lists(st.integers(0, 263), max_size=60), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_deltas_are_the_output_whenever_they_are_taken(tokenizer: Any, ids: list[int], stops: list[str]) -> None:
    request, text, tokens = new(tokenizer, 50, stop=stops), "", []
    for token in ids:
        request.append(Sampled(token))
        if token % 3 == 0 or request.finish_reason is not None:
            delta = request.take_delta()
            text += delta.text
            tokens += [sampled.token for sampled in delta.sampled]
            assert text == request.output().text
        if request.finish_reason is not None:
            break
    if request.finish_reason is None:
        request.abort()
        delta = request.take_delta()
        text += delta.text
        tokens += [sampled.token for sampled in delta.sampled]
    assert text == request.output().text
    assert tokens == request.output_token_ids == ids[: len(tokens)]
    shown = tokens[:-1] if tokens and tokens[-1] == END else tokens
    everything = tokenizer.decode(shown, skip_special_tokens=True)
    end = f"{request.stop_reason}" if isinstance(request.stop_reason, str) else ""
    assert text + end == everything
    assert not any(stop in text for stop in stops)
