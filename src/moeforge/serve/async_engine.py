"""The engine in a thread of its own, for servers that run in an asyncio loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from moeforge.errors import RunError, UserError
from moeforge.serve.engine import Engine
from moeforge.serve.outputs import CompletionDelta
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.stream import EngineDead, Stream

RETRY_AFTER_SECONDS = 1
_COMPILERS, _SCHEMAS_WAITING = 2, 16  # schemas that are compiled at once, and that wait for it
_STOP_SECONDS = 3.0  # for a step to end
_CLOSE_SECONDS = 8.0  # for the other ranks to end, by force after five
_POLL_SECONDS = 0.02


class QueueFull(RunError):
    """As many requests wait as may. Worth trying again after `retry_after_seconds`."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again later")
        self.retry_after_seconds = RETRY_AFTER_SECONDS


class EngineHangs(RunError):
    """The engine's thread cannot be ended; only the end of the process can."""


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and what it has done since it started (tokens, requests and preemptions).

    `prefix_queries` and `prefix_hits` count prompt tokens that were looked up and found.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    requests_by_finish_reason: dict[str, int] = field(default_factory=dict)


class AsyncEngine:
    """Steps an `Engine` in a thread as long as there is work, and hands on what comes of it.

    `submit`, `abort` and `shutdown` are called in the loop that called `start`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = EngineStats()
        self.failed: str | None = None
        self._news = threading.Condition()
        self._inbox: deque[Request | str] = deque()  # to add, and keys to abort, in their order
        self._new = 0  # requests that no step has seen yet
        self._waiting = 0  # in the scheduler, as of the last step
        self._free_places = engine.settings.max_num_seqs
        self._draining = self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Stream] = {}
        self._serial = count()
        self._prompt_tokens = self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        # Daemons, which nothing waits for at the end without a limit: a rank may hang.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._closer = threading.Thread(target=engine.close, name="engine-close", daemon=True)
        # Few and their own: slow schemas hold up other schemas, and nothing else.
        self._compilers = ThreadPoolExecutor(_COMPILERS, "schema")
        self._schemas = 0  # that are compiled or wait for it

    def start(self) -> None:
        """Begin to work for the running loop."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        if self.failed is None and self.engine.runner.failed is not None:  # before anyone listened
            self.fail(self.engine.runner.failed)
        self._thread.start()

    async def submit(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: bytes = b"",
    ) -> Stream:
        """Let a prompt be continued. `request_id` is a name, which need not be unique.

        Raises UserError for what cannot be served, QueueFull, and EngineDead where nothing more is taken.
        """
        most = self.engine.settings.max_waiting + self.engine.settings.max_num_seqs
        if params.n > most:
            raise UserError(f"n = {params.n}: must be at most {most}, for all to find room (max_waiting, max_num_seqs)")
        self._require_room(params.n)
        # What is still on its way of an aborted request must not reach another of the same name.
        key = f"{request_id}.{next(self._serial)}"
        if params.structured_outputs is None:
            requests = self.engine.requests(key, prompt, prompt_token_ids, params, cache_salt)
        else:
            requests = await self._compiled(key, prompt, prompt_token_ids, params, cache_salt)
            self._require_room(params.n)
        for request in requests:
            request.keeps_history = False
        with self._news:
            stream = self._streams[key] = Stream(lambda: self.abort(key), len(requests))
            self._idle.clear()
            self._inbox.extend(requests)
            self._new += len(requests)
            self._news.notify()
        return stream

    def abort(self, key: str) -> None:
        """End a request, for its stream, which gets no more."""
        self._forget(key)
        with self._news:
            self._inbox.append(key)
            self._news.notify()

    async def shutdown(self) -> None:
        """Take nothing more, finish what was taken, and end the thread and all processes."""
        self._draining = True
        if self._thread.is_alive():
            await self._idle.wait()
        await self.close()

    async def close(self) -> None:
        """End the thread and all processes within seconds, whatever they do. Raises EngineHangs where that fails."""
        self._draining = True
        with self._news:
            self._stopped = True
            self._news.notify()
        self._compilers.shutdown(wait=False, cancel_futures=True)
        await _ended(self._thread, _STOP_SECONDS)
        if self._closer.ident is None:
            self._closer.start()
        closed = await _ended(self._closer, _CLOSE_SECONDS)  # which also wakes a step that waits for another rank
        if not await _ended(self._thread, _STOP_SECONDS) or not closed:
            raise EngineHangs("the engine does not stop: a rank hangs")

    def fail(self, message: str) -> None:
        """The engine is lost: every stream is told so. Called in any thread."""
        with self._news:
            if self.failed is not None:
                return
            self.failed = message
            self._news.notify()
        if self._loop is not None:
            self._in_loop(self._end_streams, message)

    def _require_room(self, requests: int) -> None:
        if self.failed is not None:
            raise EngineDead(self.failed)
        if self._draining:
            raise EngineDead("the server is shutting down")
        with self._news:
            waiting = self._waiting + self._new
            # Places are free only as long as nobody waits for one.
            room = self.engine.settings.max_waiting + (0 if self._waiting else self._free_places)
        if waiting + requests > room:
            raise QueueFull(waiting)

    async def _compiled(self, *arguments: Any) -> list[Request]:
        if self._schemas >= _COMPILERS + _SCHEMAS_WAITING:
            raise QueueFull(self._schemas)
        self._schemas += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._compilers, self.engine.requests, *arguments)
        finally:
            self._schemas -= 1

    # In the engine's thread.

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._inbox or self._stopped or self.failed or self.engine.has_work)
                if self._stopped or self.failed is not None:
                    return
                taken = self._take_in()
            try:
                ran = self.engine.step()
            except Exception as error:
                self.fail(f"{type(error).__name__}: {error}" if not isinstance(error, RunError) else str(error))
                return
            self._hand_out(ran, taken)

    def _take_in(self) -> int:
        """Does what is in the inbox; how many requests it held."""
        taken, refused = 0, set[str]()
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                self._finished["abort"] += len(self.engine.abort(item))
                continue
            taken += 1
            if item.request_id in refused:
                continue
            try:
                self.engine.add(item)
                self._prompt_tokens += len(item.prompt_token_ids)
            except Exception as error:  # what fits into no cache, and what `submit` should have found
                refused.add(item.request_id)
                self._finished["abort"] += len(self.engine.abort(item.request_id))
                told = error if isinstance(error, UserError) else EngineDead(str(error))
                self._in_loop(self._refuse, item.request_id, told)
        return taken

    def _hand_out(self, ran: list[Request], taken: int) -> None:
        deltas: dict[str, list[CompletionDelta]] = {}
        for request in ran:
            delta = request.take_delta()
            deltas.setdefault(request.request_id, []).append(delta)
            self._generation_tokens += len(delta.sampled)
            if delta.finish_reason is not None:
                self._finished[delta.finish_reason] += 1
        scheduler = self.engine.scheduler
        with self._news:
            self._new -= taken
            self._waiting = scheduler.num_waiting
            self._free_places = max(self.engine.settings.max_num_seqs - scheduler.num_running, 0)
        stats = EngineStats(
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.kv_cache_usage,
            self._prompt_tokens,
            self._generation_tokens,
            scheduler.preemptions,
            scheduler.prefix_queries_tokens,
            scheduler.prefix_hits_tokens,
            dict(self._finished),
        )
        self._in_loop(self._deliver, deltas, stats)

    def _in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # a step that ends after the loop has
            self._loop.call_soon_threadsafe(call, *arguments)

    # In the loop.

    def _deliver(self, deltas: dict[str, list[CompletionDelta]], stats: EngineStats) -> None:
        self.stats = stats
        for request_id, new in deltas.items():
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(new)
                if not stream.unfinished:
                    self._forget(request_id)

    def _refuse(self, request_id: str, error: EngineDead | UserError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(error)
            self._forget(request_id)

    def _end_streams(self, message: str) -> None:
        for stream in self._streams.values():
            stream.put(EngineDead(message))
        self._streams.clear()
        self._idle.set()

    def _forget(self, key: str) -> None:
        self._streams.pop(key, None)
        if not self._streams:
            self._idle.set()


async def _ended(thread: threading.Thread, seconds: float) -> bool:
    """Whether a thread ends, or never began, within so long. Polled: a join would need a thread that may not end."""
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    return not thread.is_alive()
