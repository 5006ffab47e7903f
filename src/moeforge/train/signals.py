"""Ending a run early without losing the step under way."""

from __future__ import annotations

import signal
import time
from typing import Any

# A supervisor may signal a process and its group, a terminal twice: what follows this soon is the same request.
_ONE_INTENT_SECONDS = 2.0


class Signals:
    """While open, SIGTERM and SIGINT only set `caught`, so that the step under way is finished and saved.

    Another one later acts as it would outside.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._since = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._catch)
            except ValueError:  # not the main thread: signals are not ours to handle
                break
        return self

    def _catch(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.caught is None:
            self.caught, self._since = signal.Signals(number).name, now
        elif now - self._since > _ONE_INTENT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
