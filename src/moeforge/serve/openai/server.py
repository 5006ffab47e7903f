"""Runs the application under uvicorn: socket, slow clients, signals, and an end that finishes what runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moeforge.errors import RunError, UserError
from moeforge.serve.async_engine import AsyncEngine, EngineHangs
from moeforge.serve.openai.app import Service, build_app
from moeforge.serve.openai.settings import ServerSettings

_BACKLOG = 2048
_HEADER_BYTES = 64 << 10
_HEADER_SECONDS = 15.0
_KEEP_ALIVE_SECONDS = 75
_LAST_WORDS_SECONDS = 3.0  # for error events to reach their clients
_POLL_SECONDS = 0.1
_READ_BYTES = 16 << 10  # that a client must take in, each time it is looked at
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host`; port 0 is a free one. It does not listen yet: until then clients are refused.

    Raises UserError where the port is in use or may not be had.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port {port}: must be between 0 (a free one) and 65535")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _not_bound(host, port, error) from error
    return sock


def _not_bound(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port {port}: is in use on {host}; name another, or 0 for a free one")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"--host {host}: is no address of this machine; 127.0.0.1 is the safe choice")
    return UserError(f"--port {port}: cannot be used on {host} ({os.strerror(error.errno or 0)})")


def url_of(sock: socket.socket) -> str:
    """Where clients find the server."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """uvicorn's connection, cut where a request's headers take too long to come, or an answer too long to be read."""

    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, write_timeout_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._write_timeout_seconds = write_timeout_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(False)
        self._watch_reading(False)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading(True)

    def resume_writing(self) -> None:
        self._watch_reading(False)
        super().resume_writing()

    def _watch(self, expecting: bool) -> None:
        if expecting and self._headers_due is None:
            self._headers_due = self.loop.call_later(_HEADER_SECONDS, self.transport.close)
        elif not expecting and self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _watch_reading(self, expecting: bool) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
        self._reading_due = None
        if expecting:
            unread = self.transport.get_write_buffer_size()
            self._reading_due = self.loop.call_later(self._write_timeout_seconds, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() > unread - _READ_BYTES:
            self.transport.abort()  # close() would wait for what nobody reads
        else:
            self._watch_reading(True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: `run` drains first and exits with 0."""
        yield


async def run(
    engine: AsyncEngine,
    settings: ServerSettings,
    sock: socket.socket,
    shutdown_timeout: float = 30.0,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `stop`; then take nothing new, finish what runs, and return.

    What still runs after `shutdown_timeout` seconds, or at a second signal, ends with an error event.
    Raises RunError where the engine dies, after every client has been told; UserError for a port that is taken. Where
    the engine can no longer be ended, ends the process.
    """
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _not_bound(host, port, error) from error
    _allow_many_connections()
    app = build_app(engine, settings)
    service: Service = app.state.service
    server = _Server(
        uvicorn.Config(
            app,
            http=partial(Connection, write_timeout_seconds=settings.write_timeout_seconds),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=_HEADER_BYTES,
        )
    )
    engine.start()
    stop, hurry = stop or asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(server.serve([sock]))
    hung: EngineHangs | None = None
    try:
        with _signals(stop, hurry):
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if on_ready is not None and server.started:
                on_ready()
            while engine.failed is None and not stop.is_set() and not serving.done():
                await asyncio.sleep(_POLL_SECONDS)
            if engine.failed is None:
                try:
                    await _drain(engine, service, shutdown_timeout, hurry)
                except EngineHangs as error:
                    hung = error
            await _until(lambda: not service.generations, _LAST_WORDS_SECONDS)
            failed = engine.failed
    finally:
        service.closing = service.closing or "the server is shutting down"
        server.should_exit = True
        await serving
        service.prompts.close()
    if failed is not None and hung is None:
        try:
            await engine.close()
        except EngineHangs as error:
            hung = error
    if hung is not None:  # an interpreter that ends may wait for it, or for what it holds
        print(f"error: {hung}", file=sys.stderr, flush=True)
        os._exit(1)
    if failed is not None:
        raise RunError(f"the engine failed: {failed}")


async def _drain(engine: AsyncEngine, service: Service, seconds: float, hurry: asyncio.Event) -> None:
    """Nothing new; what runs may end. What does not within `seconds`, or until `hurry`, is cut."""
    service.closing = "the server is shutting down"
    ending = asyncio.create_task(engine.shutdown())
    await _until(lambda: ending.done() or hurry.is_set() or engine.failed is not None, seconds)
    if not ending.done():
        for generation in list(service.generations):
            generation.cut("the server was shut down before the answer was complete")
        await _until(ending.done, _LAST_WORDS_SECONDS)
    if ending.done():
        await ending
    else:
        ending.cancel()
        await engine.close()


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition, at most so long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition() and loop.time() < end:
        await asyncio.sleep(_POLL_SECONDS / 2)


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first signal asks to stop, a second one to hurry. Outside the main thread there are none."""

    def handle() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    try:
        for number in _SIGNALS:
            loop.add_signal_handler(number, handle)
    except (ValueError, RuntimeError):
        yield
        return
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _allow_many_connections() -> None:
    """As many open files as the system lets us have: every client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(65536, hard) if hard > 0 else 65536, hard))
