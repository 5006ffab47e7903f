"""/v1/chat/completions with the real openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
RENDERED = "<user>Hello\n<assistant>"  # the tests' template


def test_an_answer_in_one_piece(shared: Any) -> None:
    answer = shared.openai().chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tiny"
    choice = answer.choices[0]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content == RENDERED[:5]
    assert answer.usage is not None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (23, 5, 28)
    last = shared.engine.submitted[-1]
    assert last["prompt"] == RENDERED and last["id"] == answer.id


def test_a_stream_begins_with_the_role_and_ends_with_usage(shared: Any) -> None:
    stream = shared.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [RENDERED[:4]] * 2 and reasons == ["length", "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8


def test_parts_names_and_roles(shared: Any) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "d"},
    ]
    shared.openai().chat.completions.create(model="tiny", messages=messages, max_completion_tokens=1)
    assert shared.engine.submitted[-1]["prompt"] == "<system>Be short\n<user>a\nb\n<assistant>c\n<user>d\n<assistant>"


def test_parameters_reach_the_engine(shared: Any) -> None:
    shared.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"],
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"5": -100}, user="me", store=False,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2,
                    "stop_token_ids": [9], "metadata": {"a": "b"}},
    )  # fmt: skip
    params = shared.engine.submitted[-1]["params"]
    names = {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ("x", "y"), "presence_penalty": 0.1, "max_tokens": 3,
        "frequency_penalty": 0.2, "logit_bias": {5: -100.0}, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "ignore_eos": True, "min_tokens": 2, "stop_token_ids": (9,), "n": 1,
    }  # fmt: skip
    assert {name: getattr(params, name) for name in names} == names


def test_without_a_length_all_that_is_left_may_follow(shared: Any) -> None:
    shared.openai().chat.completions.create(model="tiny", messages=HELLO)
    assert shared.engine.submitted[-1]["params"].max_tokens is None


def test_logprobs(shared: Any) -> None:
    answer = shared.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first = logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("<", -0.1, [60])
    assert [t.logprob for t in first.top_logprobs] == [-0.1, -1.0]
    stream = shared.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, stream=True
    )
    tokens = [c.choices[0].logprobs.content[0] for c in stream if c.choices[0].logprobs]
    assert [token.token for token in tokens] == ["<", "u"] and tokens[0].top_logprobs == []


def test_structured_outputs_are_asked_of_the_engine(shared: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    create = shared.openai().chat.completions.create
    create(
        model="tiny", messages=HELLO, max_tokens=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    )  # fmt: skip
    assert shared.engine.submitted[-1]["params"].structured_outputs.json == (
        '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    )
    create(model="tiny", messages=HELLO, max_tokens=1, response_format={"type": "json_object"})
    assert shared.engine.submitted[-1]["params"].structured_outputs.json_object
    create(model="tiny", messages=HELLO, max_tokens=1, response_format={"type": "text"})
    assert shared.engine.submitted[-1]["params"].structured_outputs is None


def test_options_of_the_checkpoints_template(shared: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'think' if enable_thinking else 'no' }}")
    shared.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
    )
    assert shared.engine.submitted[-1]["prompt"] == "think"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "tools", "raise_exception"])
def test_no_template_in_a_request(shared: Any, name: str) -> None:
    for body in ({name: "{{ 1 }}"}, {"chat_template_kwargs": {name: "{{ 1 }}"}}):
        if body == {"messages": "{{ 1 }}"}:
            continue
        with pytest.raises(openai.BadRequestError) as caught:
            shared.openai().chat.completions.create(model="tiny", messages=HELLO, extra_body=body)
        assert name in caught.value.message


def test_the_checkpoints_template_runs_in_a_sandbox(
    shared: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(openai.BadRequestError, match="template refuses"):
        shared.openai().chat.completions.create(model="tiny", messages=HELLO)


def test_a_model_without_a_template(shared: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        shared.openai().chat.completions.create(model="tiny", messages=HELLO)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"lora_request": {"name": "x"}}, "lora_request", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
            "messages.0",
            "tools are not supported",
        ),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "tone": 1}]}, "messages.0", "unknown field 'tone'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0",
            "only text",
        ),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "messages.0", "tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differs"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "schema", "dictionary"),
    ],
)
def test_what_is_refused(shared: Any, body: dict[str, Any], param: str, words: str) -> None:
    with shared.http() as http:
        reply = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert words in error["message"] and (error["param"] or "").endswith(param), error


def test_neutral_values_of_unsupported_parameters_are_fine(shared: Any) -> None:
    body = {"tools": [], "tool_choice": "none", "functions": None, "parallel_tool_calls": True, "modalities": ["text"]}
    body |= {"service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s", "max_tokens": 1, "n": None}
    with shared.http() as http:
        reply = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | body)
    assert reply.status_code == 200, reply.text
