"""A server process of our own for the load benchmark: `moeforge serve` on a free port of this machine."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from moeforge.errors import RunError


def free_port() -> int:
    """A port of the loopback address that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(arguments: Sequence[str | Path], timeout_seconds: float = 600.0) -> Iterator[str]:
    """Runs `moeforge serve` with these arguments while the context lasts; gives its URL once it is healthy.

    Raises RunError with the last line of its stderr if it ends before.
    """
    port = free_port()
    command = [sys.executable, "-m", "moeforge", "serve", *map(str, arguments), "--port", str(port)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + timeout_seconds
            while not _healthy(url):
                if process.poll() is not None:
                    errors.seek(0)
                    last = (errors.read().strip().splitlines() or ["no message"])[-1]
                    raise RunError(f"bench serve: the server ended: {last}")
                if time.monotonic() > deadline:
                    raise RunError(f"bench serve: the server is not healthy after {timeout_seconds:.0f} s")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
