"""What stands before every route: who asks, under which name, and how much they send. Plain ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeforge.serve.openai.errors import ApiError
from moeforge.serve.openai.settings import ServerSettings

OPEN_PATHS = ("/health",)
_BROWSER_PATHS = ("/", "/page.css", "/page.js", "/metrics", "/stats", "/version")
_DRAINED_BYTES = 16 << 20  # of a body that is too long: enough for an honest client to read the refusal
_HEADERS = tuple(
    (name.encode(), value.encode())
    for name, value in {
        "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }.items()
)


def cache_salt(tenant: bytes, asked: str | None) -> bytes:
    """Prefixes are shared only between requests of one tenant that ask with the same salt."""
    return hmac.digest(tenant or b"no key", (asked or "").encode(), hashlib.sha256)


class Guard:
    """Checks the Host header, the key and the body's size and pace; adds the security headers.

    The scope's state has "tenant" (its key, or nothing without keys) and "release_body", to be called when the body
    has been read, understood and dropped.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self.settings = app, settings
        self.held_bytes = 0  # of all bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        body = _Body(receive, self)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            headers = {name: value for name, value in scope["headers"]}
            self._check_host(headers)
            state = scope.setdefault("state", {})
            state["tenant"], state["release_body"] = self._tenant(headers, scope["path"]), body.release
            if scope["method"] == "POST":
                _check_type(headers)
                await body.check_length(headers)
        except ApiError as error:
            await error.response()(scope, receive, send_safely)
        else:
            await self._app(scope, body.receive, send_safely)
        finally:
            body.release()

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Against DNS rebinding: a page of another site reaches a loopback server only under its own name."""
        allowed = self.settings.allowed_hosts
        if allowed is None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name not in allowed:
            raise ApiError(403, "Host header: this server answers to other names only (see --allowed-host)")

    def _tenant(self, headers: Mapping[bytes, bytes], path: str) -> bytes:
        """The key that the client showed, as Bearer or as the password of Basic (which browsers can ask for)."""
        keys = self.settings.keys
        if not keys or path in OPEN_PATHS:
            return b""
        scheme, _, credentials = headers.get(b"authorization", b"").strip().partition(b" ")
        shown = credentials.strip()
        if scheme.lower() == b"basic":
            try:
                shown = base64.b64decode(shown, validate=True).partition(b":")[2]
            except binascii.Error:
                shown = b""
        elif scheme.lower() != b"bearer":
            shown = b""
        found = b""
        for key in keys:  # all of them, each in constant time
            if hmac.compare_digest(shown, key):
                found = key
        if not found:
            challenge = 'Basic realm="moeforge", charset="UTF-8"' if path in _BROWSER_PATHS else "Bearer"
            message = "API key: is wrong" if shown else "API key: is missing; send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": challenge})
        return found


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    """A form of another site can post anything but JSON without asking first."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "Content-Type: must be application/json")


class _Body:
    """A request's body as it comes: at most so long, not slower than allowed, and all bodies together bounded."""

    def __init__(self, receive: Receive, guard: Guard) -> None:
        self._receive, self._guard, self._settings = receive, guard, guard.settings
        self._bytes, self._held, self._whole = 0, 0, False
        self._deadline = asyncio.get_running_loop().time() + self._settings.body_timeout_seconds

    async def check_length(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError (413) for a Content-Length beyond the limit."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            await self._refuse()

    async def receive(self) -> Message:
        """ASGI's receive. Raises ApiError: 408, 413, 429."""
        if self._whole:
            return await self._receive()
        message = await self._in_time()
        if self._bytes > self._settings.max_body_bytes:
            await self._refuse()
        self._hold(len(message.get("body", b"")))
        return message

    def release(self) -> None:
        """The body is no longer in memory."""
        self._guard.held_bytes -= self._held
        self._held = 0

    def _hold(self, count: int) -> None:
        self._held += count
        self._guard.held_bytes += count
        if self._guard.held_bytes > self._settings.max_bodies_bytes:
            headers = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(429, "body: too much is being sent at once; try again in 1 s", headers=headers)

    async def _in_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            seconds = self._settings.body_timeout_seconds
            raise ApiError(408, f"body: not there after {seconds:g} s", headers={"Connection": "close"}) from error
        self._bytes += len(message.get("body", b""))
        self._whole = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def _refuse(self) -> None:
        while not self._whole and self._bytes < self._settings.max_body_bytes + _DRAINED_BYTES:
            await self._in_time()
        most = self._settings.max_body_bytes
        raise ApiError(413, f"body: is longer than {most} bytes", headers={"Connection": "close"})
