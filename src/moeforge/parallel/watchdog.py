"""Naming the rank that holds up the others: gloo and NCCL only say that time ran out.

Every rank's thread writes what its main thread is doing into the store that torchrun keeps, about once a second. A rank
that has made no progress for too long reads what all wrote, says whom it waits for, and ends its process: torchrun then
restarts all of them, or ends the job.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch.distributed as dist

_BEAT_SECONDS = 1.0
# A rank whose heartbeat is this old has stopped or died: its thread beats also while the main thread hangs.
_SILENT_SECONDS = 5.0


@dataclass
class Progress:
    """What a rank last wrote: `done` counts finished operations, `operation` is empty between two of them; times are
    the writing machine's (`since`, of the last change) and `beat`, a counter of heartbeats."""

    rank: int
    step: int
    done: int
    operation: str
    seconds: float
    beat: int


class Watchdog:
    """Follows the main thread through `doing` and `at_step`, which cost nothing but attribute writes.

    Without `start` it only notes. Long work outside of collectives (reading data, saving) goes into `doing` as well, or
    into `paused` where it may take longer than the time-out.
    """

    def __init__(self) -> None:
        self._step, self._done, self._operation = 0, 0, ""
        self._changed = time.monotonic()
        self._paused = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def doing(self, operation: str) -> Iterator[None]:
        """The main thread is inside `operation`."""
        before, self._operation = self._operation, operation
        self._changed = time.monotonic()
        yield
        self._operation = before
        self._done += 1
        self._changed = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """However long this takes, it is no hang."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._changed = time.monotonic()

    def at_step(self, step: int) -> None:
        """The optimiser step that begins."""
        self._step, self._changed = step, time.monotonic()

    def start(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        """Begin to write heartbeats, and to end the process after `timeout_seconds` without progress."""
        self._changed = time.monotonic()
        arguments = (store, rank, world_size, timeout_seconds)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more heartbeats; the process is about to end on its own."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        beat, seen = 0, dict[int, tuple[int, float]]()
        while not self._stop.wait(min(_BEAT_SECONDS, timeout_seconds / 4)):
            beat += 1
            stuck = 0.0 if self._paused else time.monotonic() - self._changed
            mine = Progress(rank, self._step, self._done, self._operation, stuck, beat)
            try:
                store.set(f"progress/{rank}", json.dumps(asdict(mine)))
                # Everyone looks well before the time is up, so as to tell silent ranks from slow ones by then.
                if stuck > timeout_seconds / 2:
                    found = _read(store, world_size)
                    now = time.monotonic()
                    for other in found.values():
                        if seen.get(other.rank, (-1, 0.0))[0] != other.beat:
                            seen[other.rank] = (other.beat, now)
                    if stuck > timeout_seconds:
                        silent = {
                            r
                            for r in range(world_size)
                            if r not in seen or now - seen[r][1] > _silence(timeout_seconds)
                        }
                        _report(found, silent, rank, world_size, timeout_seconds)
                        os._exit(1)
            except (RuntimeError, dist.DistError):  # the store is gone: torchrun is ending the job
                return


def _silence(timeout_seconds: float) -> float:
    return min(_SILENT_SECONDS, timeout_seconds / 3)


def _read(store: dist.Store, world_size: int) -> dict[int, Progress]:
    found = {}
    for rank in range(world_size):
        if store.check([f"progress/{rank}"]):
            found[rank] = Progress(**json.loads(store.get(f"progress/{rank}")))
    return found


def _report(found: dict[int, Progress], silent: set[int], rank: int, world_size: int, timeout_seconds: float) -> None:
    """One line on stderr, from the lowest rank that can still speak."""
    if rank != min(set(range(world_size)) - silent, default=rank):
        time.sleep(1.0)  # the line first, then the ends of processes that make torchrun end all
        return
    culprits = _culprits(found, silent, world_size)
    print(
        f"moeforge: error: no progress for {timeout_seconds:g} seconds (parallel.hang_timeout_seconds); waiting for "
        + "; ".join(culprits),
        file=sys.stderr,
        flush=True,
    )


def _culprits(found: dict[int, Progress], silent: set[int], world_size: int) -> list[str]:
    if silent:
        return [f"rank {rank}: {_last(found.get(rank))}, no heartbeat since" for rank in sorted(silent)]
    # Ranks inside a collective wait for those that are not; among equals, for those that have done the least.
    outside = [each for each in found.values() if " over " not in each.operation] or list(found.values())
    least = min(each.done for each in outside)
    return [f"rank {each.rank}: {_last(each)}, for {each.seconds:.0f} s" for each in outside if each.done == least]


def _last(progress: Progress | None) -> str:
    if progress is None:
        return "never heard of"
    return f"step {progress.step}, {progress.operation or 'between two operations'}"
