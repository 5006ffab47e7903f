"""What the sides of the serving benchmark have in common, and a side that lives in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moeforge.bench import serve_worker
from moeforge.bench.serve_busy import Foreign, session_seconds
from moeforge.errors import RunError

Prompts = list[list[int]]
Run = dict[str, Any]
"""`seconds`; `foreign_share`: of the processors, 0 to 1, None if unknown; `first_tokens` [B] where the side tells."""


@dataclass(frozen=True)
class Workload:
    """`concurrency` prompts of `prompt_tokens` each, all given at once, and `new_tokens` more for each."""

    name: str
    concurrency: int
    prompt_tokens: int
    new_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> Prompts:
        """Token ids [B][S], random and therefore distinct."""
        draw = random.Random(f"{self.name} {seed}")
        return [[draw.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.concurrency)]

    def rate(self, seconds: float) -> float:
        """Generated tokens a second; where only the first is asked for, tokens of the prompt a second."""
        return self.concurrency * (self.prompt_tokens if self.new_tokens == 1 else self.new_tokens) / seconds


class Side(Protocol):
    """An engine with the model. `about`: its version and settings."""

    name: str
    about: dict[str, Any]

    def modes(self, workload: Workload) -> Sequence[str]:
        """The ways in which it can run this; the benchmark takes the fastest."""
        ...

    def run(self, workload: Workload, prompts: Prompts, mode: str) -> Run:
        """Run once. Raises RunError if it cannot."""
        ...

    def close(self) -> None: ...


class WorkerSide:
    """`serve_worker` under some interpreter, started and loaded by the constructor.

    Raises RunError, here and in `run`, with the last line of its stderr if the process fails.
    """

    def __init__(
        self,
        python: str | Path,
        job: Mapping[str, Any],
        modes: Sequence[str] = ("default",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._modes = str(job["side"]), tuple(modes)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            # -P: the folder of the script holds modules of ours whose names other packages use too.
            [python, "-P", serve_worker.__file__, json.dumps(job)],
            env=os.environ | (environment or {}), text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self.about: dict[str, Any] = self._reply()["about"]
        except BaseException:
            self.close()
            raise

    def modes(self, workload: Workload) -> Sequence[str]:
        return self._modes

    def run(self, workload: Workload, prompts: Prompts, mode: str) -> Run:
        assert self._process.stdin is not None
        command = {"prompts": prompts, "max_tokens": workload.new_tokens, "mode": mode}
        foreign = Foreign(lambda: session_seconds(self._process.pid))
        with contextlib.suppress(BrokenPipeError):  # the missing reply tells more
            print(json.dumps(command), file=self._process.stdin, flush=True)
        return self._reply() | {"foreign_share": foreign.share()}

    def close(self) -> None:
        """End the process and its children; they may have ended before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._kill()
        self._process.stdout.close()
        self._errors.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._kill()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise RunError(f"bench serve: the process of {self.name} failed: {last}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RunError(f"bench serve: {self.name}: {reply['error']}")
        return reply

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
