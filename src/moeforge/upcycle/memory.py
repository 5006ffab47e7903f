"""The peak of anonymous memory over a stretch of work: what a machine must have, unlike mapped files."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """Resident anonymous memory of this process now (RssAnon); None where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PeakAnonymous:
    """Context manager: samples RssAnon in a thread. `peak_bytes` is None where the system does not tell."""

    def __init__(self, interval_seconds: float = 0.005) -> None:
        self.peak_bytes = anonymous_bytes()
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-anonymous", daemon=True)

    def __enter__(self) -> PeakAnonymous:
        if self.peak_bytes is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_bytes = max(self.peak_bytes or 0, anonymous_bytes() or 0)
