"""/v1/completions with the real openai client."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import openai
import pytest

from moeforge.serve.openai import app


def test_text_and_token_ids_alone_and_in_lists(shared: Any) -> None:
    create = shared.openai().completions.create
    for prompt, texts in (
        ("abc", ["abca"]),
        (["abc", "xy"], ["abca", "xyxy"]),
        ([64, 65], ["abab"]),
        ([[64, 65], [87]], ["abab", "xxxx"]),
    ):
        answer = create(model="tiny", prompt=prompt, max_tokens=4)
        assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.usage is not None and answer.usage.completion_tokens == 4 * len(texts)


def test_n_continuations_of_every_prompt(shared: Any) -> None:
    answer = shared.openai().completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=1)
    assert [(c.index, c.text) for c in answer.choices] == [(i, "aaabbb"[i]) for i in range(6)]
    assert answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 6


def test_a_stream_of_many_prompts(shared: Any) -> None:
    texts = ["", "", ""]
    chunks = list(
        shared.openai().completions.create(model="tiny", prompt=["abc", "x", "yz"], max_tokens=6, stream=True)
    )
    for chunk in chunks:
        assert chunk.usage is None and "usage" not in chunk.model_fields_set
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["abcabc", "xxxxxx", "yzyzyz"]
    assert sum(choice.finish_reason == "length" for chunk in chunks for choice in chunk.choices) == 3


def test_defaults_are_openais(shared: Any) -> None:
    shared.openai().completions.create(model="tiny", prompt="a")
    params = shared.engine.submitted[-1]["params"]
    assert (params.max_tokens, params.n, params.temperature, params.logprobs) == (16, 1, 1.0, None)


def test_logprobs_and_offsets(shared: Any) -> None:
    answer = shared.openai().completions.create(model="tiny", prompt="ab", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "a"] and logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-0.1] * 3 and logprobs.top_logprobs[0] == {"a": -0.1, "!": -1.0, '"': -2.0}
    stream = shared.openai().completions.create(model="tiny", prompt="ab", max_tokens=3, logprobs=0, stream=True)
    assert [chunk.choices[0].logprobs.text_offset for chunk in stream] == [[0], [1], [2]]


def test_token_ids_come_back_where_asked_for(shared: Any) -> None:
    answer = shared.openai().completions.create(
        model="tiny", prompt=[64, 65], max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert answer.choices[0].model_extra["token_ids"] == [64, 65, 64]


def test_special_tokens_and_long_prompts_off_the_loop(shared: Any) -> None:
    text = "word " * 390
    answer = shared.openai().completions.create(model="tiny", prompt=[text] * 3, max_tokens=1)
    assert answer.usage.prompt_tokens == 3 * len(text)
    with pytest.raises(openai.BadRequestError, match="has 20000 tokens"):
        shared.openai().completions.create(model="tiny", prompt="a" * 20_000, max_tokens=1)


def test_without_a_tokenizer_only_token_ids(serve: Any) -> None:
    served = serve(type(serve().engine)(None))
    answer = served.openai().completions.create(model="tiny", prompt=[5, 6], max_tokens=2, logprobs=0)
    assert answer.choices[0].text == "" and answer.choices[0].logprobs.tokens == ["5", "6"]
    with pytest.raises(openai.BadRequestError, match="without a tokenizer"):
        served.openai().completions.create(model="tiny", prompt="a")
    with pytest.raises(openai.BadRequestError, match="without a tokenizer"):
        served.openai().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


def test_many_clients_at_once(shared: Any) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(model="tiny", prompt=f"<{i}>", max_tokens=12, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with shared.async_openai() as client:
            return await asyncio.gather(*(one(client, i) for i in range(60)))

    assert asyncio.run(all_of_them()) == [(f"<{i}>" * 12)[:12] for i in range(60)]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "0 prompts"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [1, "a"]}, "prompt", "prompt.0"),
        ({"prompt": [True]}, "prompt", "prompt.0"),
        ({"prompt": [264]}, "prompt", "between 0 and 263"),
        ({"prompt": [-1]}, "prompt", "between 0 and 263"),
        ({"prompt": [10**30]}, "prompt", "between 0 and 263"),
        ({"prompt": {"a": 1}}, "prompt", "must be a text"),
        ({"prompt": ["a"] * 129}, "prompt", "129 prompts"),
        ({"prompt": [1] * 2048}, "prompt", "at most 2047"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -5}, "max_tokens", "at least 1"),
        ({"max_tokens": 2048}, "max_tokens", "at most 2047"),
        ({"max_tokens": 10**18}, "max_tokens", "at most 2047"),
        ({"max_tokens": 10**40}, "max_tokens", "less than"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 129}, "n", "1 to 128"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "1 to 128"),
        ({"temperature": -1}, "temperature", "temperature = -1"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 1e999}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"stop": [1]}, "stop", "string"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100"),
        ({"seed": 666}, "seed", "must be another"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True, "x": 1}}, "stream_options", "unknown field 'x'"),
        ({"colour": 1}, "body", "unknown field 'colour'"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"prompt": "\ud800"}, None, "JSON"),
    ],
)
def test_what_is_refused(shared: Any, body: dict[str, Any], param: str | None, words: str) -> None:
    text = json.dumps({"model": "tiny", "prompt": "a"} | body).replace("Infinity", "1e999999999999")
    with shared.http() as http:
        reply = http.post("/v1/completions", content=text, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert words in error["message"] and "\n" not in error["message"], error
    if param is not None:
        assert (error["param"] or "").startswith(param), error
    assert not shared.engine.running


def test_another_model_and_no_model(shared: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        shared.openai().completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    with shared.http() as http:
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_the_size_of_an_answer_is_bounded(shared: Any) -> None:
    with shared.http() as http:
        for body, values in (
            ({"n": 64, "logprobs": 20, "max_tokens": 2000}, 64 * 2000 * 21),
            ({"n": 10, "logprobs": 20, "max_tokens": 2000, "prompt": ["a"] * 10}, 100 * 2000 * 21),
        ):
            reply = http.post("/v1/completions", json={"prompt": "a"} | body)
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "max_tokens"
            assert f"could hold {values} tokens and log-probabilities" in reply.json()["error"]["message"]
        messages = [{"role": "user", "content": "a"}]
        reply = http.post(
            "/v1/chat/completions", json={"messages": messages, "n": 100, "logprobs": True, "top_logprobs": 20}
        )
        assert reply.status_code == 400 and "at most 2000000" in reply.json()["error"]["message"]
        assert not shared.engine.running


def test_a_large_answer_is_written_in_a_thread_and_is_the_same(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    threads: list[str] = []
    write = app.to_json

    def noted(body: Any) -> bytes:
        threads.append(threading.current_thread().name)
        return write(body)

    monkeypatch.setattr(app, "to_json", noted)
    body = {"prompt": "abc", "max_tokens": 20, "logprobs": 2, "n": 2, "return_token_ids": True}
    with served.http() as http:
        short = http.post("/v1/completions", json=body).json()
        assert not threads
        monkeypatch.setattr(app, "_ON_LOOP", 10)
        long = http.post("/v1/completions", json=body).json()
        assert len(threads) == 1 and threads[0].startswith("asyncio_")
    assert long["choices"] == short["choices"] and len(long["choices"][1]["token_ids"]) == 20
