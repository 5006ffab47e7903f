"""What an engine in a thread of its own hands to who asked, in that one's asyncio loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from moeforge.errors import RunError, UserError
from moeforge.serve.outputs import CompletionDelta


class EngineDead(RunError):
    """The engine failed, or is being shut down."""


class Stream:
    """What comes of one prompt: lists of deltas, one list a step, until all continuations have ended.

    Raises EngineDead where the engine dies before, UserError where it refuses the request after all. Used in the loop
    that submitted it. `abort` ends the request in the engine.
    """

    def __init__(self, abort: Callable[[], None], continuations: int) -> None:
        self._abort = abort
        self._open = self.unfinished = continuations
        self._queue: asyncio.Queue[list[CompletionDelta] | EngineDead | UserError] = asyncio.Queue()

    def put(self, item: list[CompletionDelta] | EngineDead | UserError) -> None:
        """Called by the engine, in the loop."""
        if isinstance(item, list):
            self.unfinished -= sum(delta.finish_reason is not None for delta in item)
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[list[CompletionDelta]]:
        while self._open:
            item = await self._queue.get()
            if not isinstance(item, list):
                raise item
            self._open -= sum(delta.finish_reason is not None for delta in item)
            yield item

    def abort(self, reason: str | None = None) -> None:
        """End what still runs; the pages are free with the next step. Nothing where all has ended.

        With a reason, whoever reads the stream, now or later, gets it as an EngineDead.
        """
        if self.unfinished:
            self.unfinished = 0
            self._abort()
            if reason is not None:
                self.put(EngineDead(reason))
