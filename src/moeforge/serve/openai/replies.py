"""Answers that end when the client goes away: whole ones and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moeforge.serve.openai.errors import ApiError

T = TypeVar("T")
_DONE = b"data: [DONE]\n\n"
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class ClientGone(Exception):
    """Nobody is there to read the answer."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientGone then."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class EventStream(Response):
    """Server-sent events: each list of objects that `events` yields is one write, then [DONE].

    An ApiError among them becomes an error object, after which nothing follows. A client that goes ends them.
    `on_close` is called however they end.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[list[dict[str, Any]]], on_close: Callable[[], None]) -> None:
        # Neither a browser nor a proxy may keep or gather them.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._on_close = events, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, gone = asyncio.create_task(self._pump(send)), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            pump.cancel()
            self._on_close()
            with suppress(asyncio.CancelledError):
                await pump

    async def _pump(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for objects in self._events:
                await write("".join(f"data: {_compact(item)}\n\n" for item in objects).encode("utf-8", "replace"))
        except ApiError as error:
            await write(f"data: {_compact(error.body())}\n\n".encode("utf-8", "replace"), False)
        else:
            await write(_DONE, False)


def json_response(body: dict[str, Any]) -> Response:
    """A whole answer."""
    return encoded(to_json(body))


def to_json(body: dict[str, Any]) -> bytes:
    """As answers are written."""
    return _compact(body).encode("utf-8", "replace")


def encoded(body: bytes) -> Response:
    """A whole answer that is JSON already."""
    return Response(body, media_type="application/json")
