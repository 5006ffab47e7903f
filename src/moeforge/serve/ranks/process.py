"""A worker process as rank 0 sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from moeforge.errors import RunError, UserError
from moeforge.serve.ranks.frames import to_frame
from moeforge.serve.ranks.setup import Setup


class WorkerProcess:
    """Starts a process for `setup.index` and follows it in a thread: what it says, and how it ends.

    Its standard input carries its setup and then lists of integers; when that closes, it ends. Its standard output
    carries one line of JSON a message: {"value": n}, or why it fails. `on_value` is called after each value, which
    `values` then holds; `on_end` once, with the error that describes how the process failed or ended. Both are called
    in the thread.
    """

    def __init__(self, setup: Setup, on_value: Callable[[], None], on_end: Callable[[Exception], None]) -> None:
        self.index = setup.index
        self.values: deque[int] = deque()
        self._on_value, self._on_end = on_value, on_end
        threads = str(setup.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # The worker imports what this process would, not what lies in the directory where it happens to start.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moeforge.serve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for rank 0, which lets running requests finish
        )
        self.pid = self._process.pid
        self._thread = threading.Thread(target=self._follow, name=f"rank {self.index}", daemon=True)
        self._thread.start()
        self._write(setup.to_json().encode() + b"\n")

    def send(self, numbers: Sequence[int]) -> None:
        """A list of integers to the worker; nothing where it is gone, which `on_end` tells."""
        self._write(to_frame(numbers))

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def release(self) -> None:
        """Tell it to end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def join(self, seconds: float) -> None:
        """Wait until it has ended; after `seconds` it is killed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        error: Exception | None = None
        for line in self._process.stdout:
            if not line.endswith(b"\n"):  # it died while writing
                break
            message = json.loads(line)
            if "value" in message:
                self.values.append(message["value"])
                self._on_value()
                continue
            kind = UserError if message["user"] else RunError
            error = kind(f"rank {self.index}: {message['error']}")
            break
        self._on_end(error or RunError(self._ending(self._process.wait())))
        self._process.stdout.close()

    def _ending(self, code: int) -> str:
        who = f"rank {self.index} (pid {self.pid})"
        if code >= 0:
            return f"{who} ended with exit code {code}"
        hint = "; was memory short?" if -code == signal.SIGKILL else ""
        return f"{who} was killed by signal {-code} ({signal.Signals(-code).name}){hint}"
