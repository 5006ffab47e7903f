"""Hundreds of clients of the real openai package at a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moeforge.config.serving import EngineConfig
from moeforge.serve.async_engine import AsyncEngine
from moeforge.serve.engine import Engine

CLIENTS = 500


@pytest.fixture
def start(serve: Any, saved: Callable[[str], Path]) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        config = EngineConfig(device="cpu", dtype="fp32", deterministic=True, **options)
        return serve(AsyncEngine(Engine(config, saved("mixtral"))))

    return run


async def _answers(served: Any, prompts: list[str]) -> list[str | int]:
    """The streamed text for each prompt, all at once; where it was refused, the status."""
    limits = httpx.Limits(max_connections=None)
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(limits=limits, timeout=300, trust_env=False),
    ) as client:

        async def one(prompt: str) -> str | int:
            try:
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=8, temperature=0.8, seed=len(prompt), stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])
            except openai.APIStatusError as error:
                assert error.response.headers["retry-after"]
                return error.status_code

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


@pytest.mark.slow
def test_500_clients_get_what_each_would_get_alone(start: Any) -> None:
    prompts = [f"{i}: " + "ab c"[: i % 4] * (i % 5) for i in range(CLIENTS)]
    served = start(max_num_seqs=64)
    together = asyncio.run(_answers(served, prompts))
    assert not [answer for answer in together if isinstance(answer, int)]
    for i in range(0, CLIENTS, 25):
        assert asyncio.run(_answers(served, [prompts[i]])) == [together[i]]


@pytest.mark.slow
def test_a_short_queue_refuses_the_rest_and_stays_healthy(start: Any) -> None:
    served = start(max_num_seqs=4, max_waiting=16)
    answers = asyncio.run(_answers(served, [f"{i}" for i in range(CLIENTS)]))
    refused = [answer for answer in answers if isinstance(answer, int)]
    assert set(refused) == {429} and len(answers) - len(refused) >= 16
    with served.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/stats").json()["kv_cache_usage"] == 0
    assert asyncio.run(_answers(served, ["7"]))[0] == answers[7] or answers[7] == 429
