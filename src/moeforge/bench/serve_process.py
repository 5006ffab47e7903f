"""A server process of our own: `moeforge serve` on a free port of this machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeforge.errors import RunError

_END_SECONDS = 30


@contextlib.contextmanager
def server(arguments: Sequence[str | Path]) -> Iterator[str]:
    """Runs `moeforge serve` with these arguments while the context lasts; gives its URL once it is ready.

    Raises RunError with the last line of its stderr if it ends before.
    """
    command = [sys.executable, "-m", "moeforge", "serve", *map(str, arguments), "--port", "0", "--json"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            if not ready:
                process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                raise RunError(f"moeforge serve: the server ended: {last}")
            yield json.loads(ready)["url"]
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
