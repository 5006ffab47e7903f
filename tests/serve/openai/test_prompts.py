"""Prompts are made where they hold nobody up, and not at all where that is of no use."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from moeforge.serve.openai import prompts as module
from moeforge.serve.openai.errors import ApiError
from moeforge.serve.openai.prompts import Prompts


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The length of every text that is tokenised, and the thread that does."""
    seen: list[tuple[int, str]] = []
    encode = module.encode

    def counting(tokenizer: Any, text: str, special: bool) -> list[int]:
        seen.append((len(text), threading.current_thread().name))
        return encode(tokenizer, text, special)

    monkeypatch.setattr(module, "encode", counting)
    return seen


def test_what_cannot_fit_is_not_tokenised(tokenizer: Any, encoded: list[tuple[int, str]]) -> None:
    made = Prompts(tokenizer, 100)
    most = 100 * max(16, *map(len, tokenizer.get_vocab()))
    with pytest.raises(ApiError, match=f"prompt: has {most + 1} characters; .* at most 99") as caught:
        asyncio.run(made.completion("a" * (most + 1), True, None))
    assert caught.value.code == "context_length_exceeded" and not encoded
    with pytest.raises(ApiError, match=r"messages: has \d+ characters"):
        asyncio.run(made.chat([{"role": "user", "content": "a" * (most + 1)}], {}, None))
    assert not encoded
    with pytest.raises(ApiError, match=f"has {most} tokens"):
        asyncio.run(made.completion("a" * most, False, None))
    assert [length for length, _ in encoded] == [most]
    made.close()


def test_what_takes_long_leaves_the_loop(tokenizer: Any, encoded: list[tuple[int, str]]) -> None:
    made = Prompts(tokenizer, 100_000)
    here = threading.current_thread().name
    turn = {"role": "user", "content": "a"}

    async def run() -> None:
        await made.completion("a" * 4000, True, None)
        await made.chat([turn], {"x": 1}, None)
        await made.completion("a" * 5000, True, None)
        await made.chat([turn | {"name": "b" * 5000}], {}, None)
        await made.chat([turn], {"x": "c" * 5000}, None)
        await made.chat([turn] * 20, {"x": "c" * 300}, None)

    asyncio.run(run())
    assert [name == here for _, name in encoded] == [True, True, False, False, False, False]
    made.close()


def test_nobody_waits_for_prompts_whose_clients_have_gone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, encoded: list[tuple[int, str]]
) -> None:
    made, gate, counting = Prompts(tokenizer, 100_000), threading.Event(), module.encode
    monkeypatch.setattr(module, "encode", lambda *arguments: gate.wait(10) and counting(*arguments))

    async def run() -> None:
        waiting = [asyncio.create_task(made.completion("a" * (5000 + i), True, None)) for i in range(10)]
        await asyncio.sleep(0.05)
        for task in waiting[1:9]:
            task.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())
    assert [length for length, _ in encoded] == [5000, 5009]
    made.close()
