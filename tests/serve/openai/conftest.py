"""An engine that needs no model, and a real uvicorn server around it in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from moeforge.errors import UserError
from moeforge.serve.async_engine import EngineStats, QueueFull
from moeforge.serve.openai import server
from moeforge.serve.openai.settings import ServerSettings
from moeforge.serve.outputs import CompletionDelta, Sampled
from moeforge.serve.stream import EngineDead

MODEL = "tiny"


class FakeStream:
    """Echoes the prompt's tokens back, one a step, again and again, until max_tokens; ends as the engine's does."""

    def __init__(self, engine: FakeAsyncEngine, prompt_token_ids: list[int], params: Any) -> None:
        self._engine, self._ids, self._params = engine, prompt_token_ids, params
        self.aborted = self.ended = False

    def abort(self, reason: str | None = None) -> None:
        if not self.ended and not self.aborted:
            self.aborted, self._reason = True, reason
            self._engine.finished(self, "abort")

    async def __aiter__(self) -> AsyncIterator[list[CompletionDelta]]:
        most = self._params.max_tokens or 64
        for step in range(most):
            if self._engine.fault is not None:
                raise self._engine.fault
            await asyncio.sleep(self._engine.step_seconds)
            if self._engine.failed is not None:
                self.abort()
                raise EngineDead(self._engine.failed)
            if self.aborted and self._reason is not None:
                raise EngineDead(self._reason)
            if self.aborted:
                await asyncio.Event().wait()  # nothing more comes
            deltas = self._deltas(self._ids[step % len(self._ids)])
            if step + 1 == most:
                self.ended = True
                self._engine.finished(self, "length")
                reason, why = ("length", None) if self._engine.gives_up is None else ("abort", self._engine.gives_up)
                deltas = [replace(last, finish_reason=reason, stop_reason=why) for last in deltas]
            yield deltas

    def _deltas(self, token: int) -> list[CompletionDelta]:
        top = None
        if (count := self._params.logprobs) is not None:
            top = {token: -0.1} | {i: -1.0 - i for i in range(count) if i != token}
        sampled = Sampled(token, None if top is None else -0.1, top)
        self._engine.generation_tokens += self._params.n
        return [CompletionDelta(i, self._engine.text_of(token), (sampled,)) for i in range(self._params.n)]


class FakeAsyncEngine:
    """The interface of AsyncEngine. `submitted` remembers every request; `queue` is how many may run at once."""

    def __init__(self, tokenizer: Any | None, max_model_len: int = 2048, vocab_size: int = 264) -> None:
        config = SimpleNamespace(vocab_size=vocab_size)
        self.engine = SimpleNamespace(tokenizer=tokenizer, model_config=config, max_model_len=max_model_len)
        self.failed: str | None = None
        self.fault: Exception | None = None
        self.gives_up: str | None = None
        self.step_seconds = 0.001
        self.queue = 1000
        self.running: list[FakeStream] = []
        self.submitted: list[dict[str, Any]] = []
        self.reasons: dict[str, int] = {}
        self.prompt_tokens = self.generation_tokens = 0
        self.started = self.closing = False

    def start(self) -> None:
        self.started = True

    async def submit(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: Any, cache_salt: bytes = b""
    ) -> FakeStream:
        if not prompt_token_ids:
            raise UserError("prompt: is empty (no tokens)")
        if not all(0 <= token < self.engine.model_config.vocab_size for token in prompt_token_ids):
            raise UserError("prompt: token ids must be between 0 and 263")
        if params.seed == 666:
            raise UserError("seed = 666: must be another")
        if self.failed is not None or self.closing:
            raise EngineDead(self.failed or "closing")
        if len(self.running) >= self.queue:
            raise QueueFull(self.queue)
        self.submitted.append(
            {"id": request_id, "prompt": prompt, "ids": prompt_token_ids, "params": params, "salt": cache_salt}
        )
        self.prompt_tokens += len(prompt_token_ids)
        stream = FakeStream(self, prompt_token_ids, params)
        self.running.append(stream)
        return stream

    def finished(self, stream: FakeStream, reason: str) -> None:
        self.running.remove(stream)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def text_of(self, token: int) -> str:
        tokenizer = self.engine.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode([token]))

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            kv_cache_usage=0.25,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            preemptions=3,
            prefix_queries=20,
            prefix_hits=10,
            requests_by_finish_reason=dict(self.reasons),
        )

    async def shutdown(self) -> None:
        self.closing = True
        while self.running:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closing = True


class Served:
    """A running server: its URL, its engine, and ways to talk to it. `end()` asks it to stop and waits."""

    def __init__(self, engine: Any, settings: ServerSettings, shutdown_timeout: float) -> None:
        self.engine, self.settings = engine, settings
        self.error: BaseException | None = None
        self._ready = threading.Event()
        sock = server.bind("127.0.0.1", 0)
        self.url = server.url_of(sock)

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await server.run(engine, settings, sock, shutdown_timeout, self._ready.set, self._stop)

        def target() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                self.error = error
            self._ready.set()

        self._thread = threading.Thread(target=target, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def ask_to_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def wait(self, seconds: float = 15) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server does not end"

    def end(self) -> None:
        if self._thread.is_alive():
            self.ask_to_stop()
            self.wait()

    @staticmethod
    def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Waits for something that happens on the server's thread."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, timeout=20, headers=headers, trust_env=False, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def async_openai(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    """`serve(engine=..., shutdown_timeout=..., **settings)`: starts a server; all are stopped after the test."""
    running: list[Served] = []

    def start(engine: Any = None, shutdown_timeout: float = 5.0, **settings: Any) -> Served:
        served = Served(engine or FakeAsyncEngine(tokenizer), ServerSettings(MODEL, **settings), shutdown_timeout)
        running.append(served)
        return served

    yield start
    for served in running:
        if isinstance(served.engine, FakeAsyncEngine):
            for stream in list(served.engine.running):
                served._loop.call_soon_threadsafe(stream.abort)
        served.end()


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[Served]:
    """One server for tests that leave it as it is."""
    served = Served(FakeAsyncEngine(tokenizer), ServerSettings(MODEL), 5.0)
    yield served
    served.end()
