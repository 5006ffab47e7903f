"""What else the processors did while something was measured: a busy machine shows in the result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def session_seconds(session: int) -> float:
    """Processor seconds of the living processes of a session and of their ended children; 0 without /proc."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / _TICKS


def busy_seconds() -> float | None:
    """Processor seconds that all processes of this machine have used; None where the system does not tell."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _wait, irq, softirq = map(int, stat.readline().split()[1:8])
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / _TICKS


class Foreign:
    """Starts to watch when made. `own`: the processor seconds that do not count as foreign, so far."""

    def __init__(self, own: Callable[[], float]) -> None:
        self._own = own
        self._start, self._busy, self._mine = time.perf_counter(), busy_seconds(), own()

    def share(self) -> float | None:
        """Of all processors' time since then, what went to others: 0 to 1; None where the system does not tell."""
        seconds, busy = time.perf_counter() - self._start, busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = busy - self._busy - (self._own() - self._mine)
        return min(1.0, max(0.0, foreign / (seconds * (os.cpu_count() or 1))))
