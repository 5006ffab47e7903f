"""Naming the rank that holds up the others: gloo and NCCL only say that time ran out.

Every rank's thread writes what its main thread is doing into the store that torchrun keeps, about once a second. A rank
that has made no progress for too long reads what all wrote, says whom it waits for, and ends its process: torchrun then
restarts all of them, or ends the job.
"""

from __future__ import annotations

import atexit
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
# A rank that writes nothing for so long has stopped or died: its thread beats also while the main thread hangs.
_SILENT_SECONDS = 60.0
_NAMED = 8


@dataclass(frozen=True)
class Progress:
    """What a rank last wrote: `done` counts finished operations, `operation` is empty between two of them, `seconds`
    went by without progress, `paused` where that may take as long as it likes; `beat` counts what it wrote."""

    rank: int
    step: int
    done: int
    operation: str
    seconds: float
    paused: bool
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
        """The main thread is inside `operation`; "NAME over GROUP" is one that waits for other ranks."""
        before, self._operation = self._operation, operation
        self._changed = time.monotonic()
        try:
            yield
            self._done += 1
        finally:
            self._operation = before
            self._changed = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """However long this takes, it is no hang: neither here nor on the ranks that wait for this one."""
        self._paused += 1
        try:
            yield
        finally:
            self._changed = time.monotonic()
            self._paused -= 1

    def at_step(self, step: int) -> None:
        """The optimiser step that begins."""
        self._step, self._changed = step, time.monotonic()

    def start(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        """Begin to write heartbeats, and to end the process after `timeout_seconds` without progress."""
        self._changed = time.monotonic()
        arguments = (store, rank, world_size, timeout_seconds)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread inside the store's code while the interpreter ends would abort it

    def stop(self) -> None:
        """No more heartbeats; whatever follows may take as long as it likes."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
            atexit.unregister(self.stop)

    def progress(self, rank: int, beat: int) -> Progress:
        """What the main thread is doing now."""
        paused = self._paused > 0
        seconds = 0.0 if paused else time.monotonic() - self._changed
        return Progress(rank, self._step, self._done, self._operation, seconds, paused, beat)

    def _watch(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        silence = min(_SILENT_SECONDS, timeout_seconds / 2)
        beat, before, looked, reachable = 0, dict[int, Progress](), 0.0, True
        while True:
            beat += 1
            mine = self.progress(rank, beat)
            try:
                if reachable:
                    store.set(f"progress/{rank}", json.dumps(asdict(mine)))
                # Two looks, the first before the time is up, tell who is silent; no more, for all ranks look at once.
                if mine.seconds <= timeout_seconds - silence:
                    before = {}
                elif not reachable:
                    if mine.seconds > timeout_seconds:
                        _end(timeout_seconds, "the store that ranks write their progress to, which does not answer")
                elif not before:
                    before, looked = _read(store, world_size), time.monotonic()
                elif mine.seconds > timeout_seconds and time.monotonic() - looked >= silence:
                    found = _read(store, world_size)
                    silent = {r for r in range(world_size) if _beat(found, r) == _beat(before, r)} - {rank}
                    # What is paused and alive will come: everybody waits for it.
                    if silent or not any(each.paused for each in found.values()):
                        _report(store, found, silent, rank, timeout_seconds)
                    before, looked = found, time.monotonic()
            except RuntimeError:  # torch's errors about stores are
                reachable = False
            if self._stop.wait(_interval(timeout_seconds)):
                return


def _read(store: dist.Store, world_size: int) -> dict[int, Progress]:
    keys = [f"progress/{rank}" for rank in range(world_size)]
    if not store.check(keys):  # getting a missing one would wait for it
        keys = [key for key in keys if store.check([key])]
    return {found.rank: found for found in (Progress(**json.loads(text)) for text in store.multi_get(keys))}


def _beat(found: dict[int, Progress], rank: int) -> int:
    return found[rank].beat if rank in found else 0


def _report(store: dist.Store, found: dict[int, Progress], silent: set[int], rank: int, timeout_seconds: float) -> None:
    """End this process; the first rank that gets here says why."""
    if store.compare_set("reported", "", str(rank)) != str(rank).encode():
        _end(timeout_seconds)
    if silent:
        culprits = [f"rank {r}: {_last(found.get(r))}, no heartbeat since" for r in sorted(silent)]
    else:
        culprits = [f"rank {p.rank}: {_last(p)}, for {p.seconds:.0f} s" for p in _holding_up(found, timeout_seconds)]
    if len(culprits) > _NAMED:
        culprits[_NAMED:] = [f"and {len(culprits) - _NAMED} more"]
    _end(timeout_seconds, "; ".join(culprits))


def _end(timeout_seconds: float, culprits: str = "") -> None:
    """One line on stderr if there is something to say; no clean-up, which could hang as well."""
    if culprits:
        print(
            f"moeforge: error: no progress for {timeout_seconds:g} seconds (parallel.hang_timeout_seconds); waiting "
            f"for {culprits}",
            file=sys.stderr,
            flush=True,
        )
    # Time for the others to end by themselves, rather than by errors about connections to this process.
    time.sleep(3 * _interval(timeout_seconds))
    os._exit(1)


def _interval(timeout_seconds: float) -> float:
    return min(_BEAT_SECONDS, timeout_seconds / 8)


def _holding_up(found: dict[int, Progress], timeout_seconds: float) -> list[Progress]:
    """Ranks inside a collective wait for those that are not; if all are inside, for those that have done the least."""
    outside = [p for p in found.values() if " over " not in p.operation and p.seconds > timeout_seconds / 2]
    least = min((p.step, p.done) for p in found.values())
    return outside or [p for p in found.values() if (p.step, p.done) == least]


def _last(progress: Progress | None) -> str:
    if progress is None:
        return "never heard of"
    return f"step {progress.step}, {progress.operation or 'between two operations'}"
