"""One HTTP request's work in the engine: a stream for each prompt, merged, timed, and ended with the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

from moeforge.errors import UserError
from moeforge.serve.async_engine import AsyncEngine, QueueFull
from moeforge.serve.openai.errors import ApiError, bad_request, of_user_error, shown, unavailable
from moeforge.serve.openai.metrics import Metrics
from moeforge.serve.openai.prompts import Prompt
from moeforge.serve.outputs import CompletionDelta
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.stream import EngineDead, Stream

Choice = tuple[int, CompletionDelta]


class Generation:
    """Prompts that are in the engine now. Continuation i of prompt p is choice p * n + i."""

    def __init__(self, request_id: str, streams: list[Stream], n: int, prompt_tokens: int, metrics: Metrics) -> None:
        self.request_id, self.n, self.choices = request_id, n, len(streams) * n
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._streams, self._metrics, self._begin = streams, metrics, time.monotonic()
        self._latest = [0.0] * self.choices
        self._cut: str | None = None

    @classmethod
    async def start(
        cls,
        engine: AsyncEngine,
        metrics: Metrics,
        request_id: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        cache_salt: bytes,
    ) -> Generation:
        """Hand prompts to the engine: all of them or none.

        Raises ApiError: 400 for bad values, 429 for a full queue, 503 for a dead engine.
        """

        streams: list[Stream] = []
        try:
            for i, prompt in enumerate(prompts):
                name = request_id if len(prompts) == 1 else f"{request_id}-{i}"
                streams.append(await engine.submit(name, prompt.text, prompt.ids, params, cache_salt))
        except BaseException as error:
            for stream in streams:
                stream.abort()
            if isinstance(error, UserError | QueueFull | EngineDead):
                raise _refusal(error) from error
            raise
        return cls(request_id, streams, params.n, sum(len(prompt.ids) for prompt in prompts), metrics)

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's object."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def abort(self) -> None:
        """Give up what has not ended. Nothing more comes of it, also not to whoever waits in `deltas`."""
        for stream in self._streams:
            stream.abort()

    def cut(self, reason: str) -> None:
        """Give up, and let whoever reads `deltas`, now or later, hear why."""
        self._cut = reason
        for stream in self._streams:
            stream.abort(reason)

    async def deltas(self) -> AsyncGenerator[list[Choice], None]:
        """What each step adds, by choice.

        Raises ApiError: 500 and 503 where the engine dies or the request is cut; 400 and 500 where the engine gives up
        this request alone.
        """
        try:
            async with aclosing(self._numbered(0) if len(self._streams) == 1 else self._merged()) as steps:
                async for choices in steps:
                    self._observe(choices)
                    for _, delta in choices:
                        if delta.finish_reason == "abort":
                            raise _given_up(str(delta.stop_reason or "aborted"))
                    yield choices
        except UserError as error:
            raise of_user_error(error) from error
        except EngineDead as error:
            if self._cut is not None:
                raise unavailable(self._cut) from error
            raise ApiError(500, f"the engine failed: {error}", code="engine_dead") from error
        finally:
            self.abort()

    async def _numbered(self, prompt: int) -> AsyncGenerator[list[Choice], None]:
        first = prompt * self.n
        async for deltas in self._streams[prompt]:
            yield [(first + delta.index, delta) for delta in deltas]

    async def _merged(self) -> AsyncGenerator[list[Choice], None]:
        """All streams' steps as they come."""
        arrived: asyncio.Queue[list[Choice] | BaseException | None] = asyncio.Queue()

        async def forward(prompt: int) -> None:
            try:
                async for choices in self._numbered(prompt):
                    arrived.put_nowait(choices)
                arrived.put_nowait(None)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(forward(prompt)) for prompt in range(len(self._streams))]
        try:
            running = len(tasks)
            while running:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def _observe(self, choices: Iterable[Choice]) -> None:
        now = time.monotonic()
        for choice, delta in choices:
            count = len(delta.sampled)
            if count:
                self.completion_tokens += count
                before = self._latest[choice]
                if before:
                    for _ in range(count):
                        self._metrics.between_tokens.observe((now - before) / count)
                else:
                    self._metrics.first_token.observe(now - self._begin)
                self._latest[choice] = now
            if delta.finish_reason is not None:
                self._metrics.whole.observe(now - self._begin)


def _given_up(reason: str) -> ApiError:
    """Why a request cannot go on: its schema, or a fault of ours."""
    if reason.startswith("structured_outputs:"):
        return bad_request(shown(reason.replace("structured_outputs", "response_format", 1), 360), "response_format")
    return ApiError(500, shown(f"the request failed: {reason}", 360), code="request_failed")


def _refusal(error: UserError | QueueFull | EngineDead) -> ApiError:
    if isinstance(error, QueueFull):
        seconds = error.retry_after_seconds
        return ApiError(
            429,
            f"the queue is full; try again in {seconds} s",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )
    return of_user_error(error) if isinstance(error, UserError) else unavailable(str(error))
