"""Load on a running OpenAI-compatible server over streaming HTTP, and the latencies that its clients see."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from moeforge.errors import RunError

PERCENTILES = (50, 90, 99)
_TIMEOUT = httpx.Timeout(600.0, connect=30.0)


def arrivals(rate: float, requests: int, seed: int) -> list[float]:
    """Seconds from the start at which a Poisson process of `rate` a second makes its first `requests` arrivals."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(requests)))


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None of nothing."""
    if not seconds:
        return None
    values = np.percentile(seconds, PERCENTILES) * 1e3
    return {"mean": float(np.mean(seconds)) * 1e3} | {
        f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)
    }


@dataclass
class Sample:
    """One request: when it was due, when the pieces of its answer came, its new tokens, and what went wrong."""

    due: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    error: str | None = None


def report(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Latencies count from the moment a request was due, so a client that lags does not flatter the server.

    inter_token_ms: gaps between pieces of one answer. Failed requests count as `errors` and in nothing else.
    """
    done = [sample for sample in samples if sample.error is None]
    errors = sorted({sample.error for sample in samples if sample.error is not None})
    tokens = sum(sample.tokens for sample in done)
    return {
        "requests": len(samples),
        "errors": len(samples) - len(done),
        "error_messages": errors[:5],
        "seconds": seconds,
        "requests_per_second": len(done) / seconds,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / seconds,
        "ttft_ms": summary([sample.pieces[0] - sample.due for sample in done]),
        "inter_token_ms": summary([b - a for sample in done for a, b in itertools.pairwise(sample.pieces)]),
        "end_to_end_ms": summary([sample.end - sample.due for sample in done]),
    }


class Load:
    """Requests of distinct random token ids below `vocab_size` to one server.

    Raises RunError if no model is served at `url`.
    """

    def __init__(
        self, url: str, vocab_size: int, prompt_tokens: int, new_tokens: int, seed: int = 0, api_key: str | None = None
    ) -> None:
        self._url, self._vocab_size = url.rstrip("/"), vocab_size
        self._prompt_tokens, self._new_tokens, self._seed = prompt_tokens, new_tokens, seed
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            answer = httpx.get(f"{self._url}/v1/models", headers=self._headers, timeout=_TIMEOUT)
            self.model = str(answer.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise RunError(f"bench serve: {url} serves no model ({error or type(error).__name__})") from error

    def open_loop(self, rate: float, requests: int) -> dict[str, Any]:
        """Requests at Poisson times, whether or not the earlier ones are answered."""

        async def send(client: httpx.AsyncClient, start: float) -> list[Sample]:
            async def one(index: int, offset: float) -> Sample:
                await asyncio.sleep(start + offset - time.perf_counter())
                return await self._ask(client, index, start + offset)

            times = arrivals(rate, requests, self._seed)
            return await asyncio.gather(*(one(index, offset) for index, offset in enumerate(times)))

        return {"rate": rate} | self._measure(send)

    def closed_loop(self, concurrency: int, requests: int) -> dict[str, Any]:
        """`concurrency` clients, each of which asks again when it is answered."""

        async def send(client: httpx.AsyncClient, start: float) -> list[Sample]:
            async def one(indices: Iterator[int]) -> list[Sample]:
                return [await self._ask(client, index, time.perf_counter()) for index in indices]

            shared = iter(range(requests))
            lists = await asyncio.gather(*(one(shared) for _ in range(concurrency)))
            return [sample for samples in lists for sample in samples]

        return {"concurrency": concurrency} | self._measure(send)

    def _measure(self, send: Callable[[httpx.AsyncClient, float], Awaitable[list[Sample]]]) -> dict[str, Any]:
        async def run() -> dict[str, Any]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT, limits=limits) as client:
                await self._ask(client, -1, 0.0)  # the first answer of a server warms it up
                start = time.perf_counter()
                samples = await send(client, start)
                return report(samples, time.perf_counter() - start)

        return asyncio.run(run())

    async def _ask(self, client: httpx.AsyncClient, index: int, due: float) -> Sample:
        draw = random.Random(f"{self._seed} {index}")
        body = {
            "model": self.model,
            "prompt": [draw.randrange(self._vocab_size) for _ in range(self._prompt_tokens)],
            "max_tokens": self._new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sample = Sample(due)
        try:
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    sample.error = f"HTTP {answer.status_code}: {answer.text[:200]}"
                    return sample
                async for line in answer.aiter_lines():
                    self._take(line, sample)
        except httpx.HTTPError as error:
            sample.error = f"{type(error).__name__}: {error}"
        sample.end = time.perf_counter()
        if sample.error is None and not (sample.pieces and sample.tokens):
            sample.error = "the stream ended without an answer"
        return sample

    @staticmethod
    def _take(line: str, sample: Sample) -> None:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            sample.error = str(event["error"])[:200]
        elif event.get("choices"):
            sample.pieces.append(time.perf_counter())
        if usage := event.get("usage"):
            sample.tokens = usage["completion_tokens"]
