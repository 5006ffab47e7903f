"""Real processes that hang, stop, die and take their time; what the others say, and how all end."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moeforge.parallel import Watchdog
from moeforge.parallel.watchdog import Progress, _holding_up

TIMEOUT = 2.0
Rank = Callable[[int, Watchdog], None]


def store_at(port: int) -> dist.Store:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore("watchdog", store)


class Ranks:
    """Forked processes that watch each other through a store which outlives them, as torchrun's does.

    The store's server has a process of its own: forking beside its thread can leave a child with a lock held for ever.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.pids = directory, list[int]()
        receive, send = os.pipe()
        self.server = os.fork()
        if self.server == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(send, str(store.port).encode())
            time.sleep(120)
            os._exit(0)
        self.port = int(os.read(receive, 16))
        os.close(receive)
        os.close(send)

    def end_server(self) -> None:
        if self.server:
            os.kill(self.server, signal.SIGKILL)
            os.waitpid(self.server, 0)
            self.server = 0

    def start(self, world_size: int, body: Rank) -> None:
        for rank in range(world_size):
            if (pid := os.fork()) == 0:
                code = 70
                try:
                    torch.set_num_threads(1)
                    sys.stderr = (self.directory / f"{rank}.err").open("w")
                    watchdog = Watchdog()
                    watchdog.start(store_at(self.port), rank, world_size, TIMEOUT)
                    watchdog.at_step(7)
                    body(rank, watchdog)
                    watchdog.stop()
                    code = 0
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def codes(self, wanted: set[int], timeout: float = 20.0) -> dict[int, int]:
        """Exit codes of these ranks; those that never end are missing."""
        found, deadline = dict[int, int](), time.monotonic() + timeout
        while wanted - found.keys() and time.monotonic() < deadline:
            for rank in wanted - found.keys():
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    found[rank] = os.waitstatus_to_exitcode(status)
                    self.pids[rank] = 0
            time.sleep(0.02)
        return found

    def lines(self) -> list[str]:
        """What the ranks said of hangs."""
        text = "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob("*.err")))
        return [line for line in text.splitlines() if line.startswith("moeforge: error")]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    made.end_server()
    for pid in filter(None, made.pids):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def named(line: str) -> list[int]:
    """The ranks that a line says are waited for."""
    assert line.startswith(f"moeforge: error: no progress for {TIMEOUT:g} seconds (parallel.hang_timeout_seconds); ")
    return [int(rank) for rank in re.findall(r"rank (\d+):", line)]


def wait(watchdog: Watchdog, operation: str, seconds: float = 30.0) -> None:
    with watchdog.doing(operation):
        time.sleep(seconds)


@pytest.mark.parametrize("sleeper", [0, 1])
def test_a_rank_that_sleeps_is_named_and_all_end(sleeper: int, ranks: Ranks) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        wait(watchdog, "reading data" if rank == sleeper else "all_reduce over dp")

    began = time.monotonic()
    ranks.start(3, body)
    assert ranks.codes({0, 1, 2}) == {0: 1, 1: 1, 2: 1}
    assert TIMEOUT < time.monotonic() - began < TIMEOUT + 5
    (line,) = ranks.lines()
    assert named(line) == [sleeper]
    assert f"waiting for rank {sleeper}: step 7, reading data, for 2 s" in line


def test_a_stopped_process_is_named(ranks: Ranks) -> None:
    ranks.start(3, lambda rank, watchdog: wait(watchdog, "all_to_all over block"))
    time.sleep(0.8)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    assert ranks.codes({1, 2}) == {1: 1, 2: 1}
    assert ranks.lines()[0].endswith("rank 0: step 7, all_to_all over block, no heartbeat since")
    assert [named(line) for line in ranks.lines()] == [[0]]


@pytest.mark.slow
def test_a_killed_process_is_named(ranks: Ranks) -> None:
    """Under gloo the others notice at once, by their connections; NCCL would wait."""
    ranks.start(3, lambda rank, watchdog: wait(watchdog, "all_reduce over tp"))
    time.sleep(0.8)
    os.kill(ranks.pids[2], signal.SIGKILL)
    assert ranks.codes({0, 1, 2}) == {0: 1, 1: 1, 2: -signal.SIGKILL}
    assert [named(line) for line in ranks.lines()] == [[2]]


@pytest.mark.slow
def test_a_rank_that_never_came_is_named(ranks: Ranks) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        if rank == 1:
            os._exit(9)  # as one that failed while importing
        wait(watchdog, "all_reduce over world")

    ranks.start(2, body)
    assert ranks.codes({0, 1}) == {0: 1, 1: 9}
    assert [named(line) for line in ranks.lines()] == [[1]]


def test_one_line_also_where_the_lowest_rank_is_the_last_to_hang(ranks: Ranks) -> None:
    """Rank 0 goes on for a while, as an earlier stage of a pipeline does."""

    def body(rank: int, watchdog: Watchdog) -> None:
        if rank == 0:
            for _ in range(15):
                wait(watchdog, "send over pp", 0.1)
        wait(watchdog, "reading data" if rank == 1 else "all_reduce over dp")

    ranks.start(3, body)
    assert ranks.codes({0, 1, 2}) == {0: 1, 1: 1, 2: 1}
    assert [named(line) for line in ranks.lines()] == [[1]]


@pytest.mark.slow
def test_real_collectives_that_wait_for_a_sleeping_rank(ranks: Ranks) -> None:
    """Main threads inside gloo leave the watchdog's thread free to speak."""

    def body(rank: int, watchdog: Watchdog) -> None:
        store = dist.TCPStore("127.0.0.1", ranks.port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=60))
        for step in range(3):
            watchdog.at_step(step)
            if (rank, step) == (1, 2):
                wait(watchdog, "reading data")
            with watchdog.doing("all_reduce over world"):
                dist.all_reduce(torch.ones(1))

    ranks.start(3, body)
    codes = ranks.codes({0, 1, 2})
    # On a busy machine one may lose its connection just before its own time is up, and end by gloo's error.
    assert codes.keys() == {0, 1, 2} and all(codes.values())
    (line,) = ranks.lines()
    assert "waiting for rank 1: step 2, reading data" in line


def test_long_work_with_an_end_is_no_hang(ranks: Ranks) -> None:
    """Neither on the rank that says so nor on those that wait for it; slow steps are none either."""

    def body(rank: int, watchdog: Watchdog) -> None:
        if rank == 0:
            with watchdog.paused():
                time.sleep(2 * TIMEOUT)
        elif rank == 1:
            wait(watchdog, "all_gather over world", 2 * TIMEOUT)
        else:
            for step in range(4):
                watchdog.at_step(step)
                time.sleep(TIMEOUT / 2)

    ranks.start(3, body)
    assert ranks.codes({0, 1, 2}) == {0: 0, 1: 0, 2: 0}
    assert ranks.lines() == []


@pytest.mark.slow
def test_a_stopped_process_is_named_also_where_it_was_paused(ranks: Ranks) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        if rank == 0:
            with watchdog.paused():
                time.sleep(30)
        wait(watchdog, "all_gather over world")

    ranks.start(2, body)
    time.sleep(0.8)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    assert ranks.codes({1}) == {1: 1}
    assert [named(line) for line in ranks.lines()] == [[0]]


@pytest.mark.slow
def test_a_lost_store_neither_ends_a_run_nor_hides_a_hang(ranks: Ranks) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        for _ in range(10):
            wait(watchdog, "all_reduce over world", TIMEOUT / 4)
        (ranks.directory / "through").touch()
        wait(watchdog, "all_reduce over world")

    ranks.start(1, body)
    time.sleep(0.8)
    ranks.end_server()
    assert ranks.codes({0}) == {0: 1}
    assert (ranks.directory / "through").exists()
    (line,) = ranks.lines()
    assert line.endswith("waiting for the store that ranks write their progress to, which does not answer")


def test_a_run_that_ends_leaves_no_thread(ranks: Ranks) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
        watchdog.stop()
        watchdog.stop()
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]

    ranks.start(2, body)
    assert ranks.codes({0, 1}) == {0: 0, 1: 0}


def test_operations_may_nest_and_fail() -> None:
    watchdog = Watchdog()
    with watchdog.doing("pipeline step over pp"):
        with watchdog.doing("all_to_all over block"):
            assert watchdog.progress(0, 1).operation == "all_to_all over block"
        inside = watchdog.progress(0, 2)
        assert (inside.operation, inside.done) == ("pipeline step over pp", 1)
    with pytest.raises(OSError), watchdog.doing("reading data"):
        raise OSError
    after = watchdog.progress(0, 3)
    assert (after.operation, after.done, after.paused) == ("", 2, False)
    with watchdog.paused(), watchdog.paused():
        assert watchdog.progress(0, 4).paused
    assert not watchdog.progress(0, 5).paused


def test_who_is_held_responsible() -> None:
    """Without processes: who is outside of collectives, or else has done the least; not who only computes."""
    inside = Progress(0, 5, 40, "all_reduce over dp", 12.0, False, 12)

    def ranks_named(*all_of_them: Progress) -> list[int]:
        return [p.rank for p in _holding_up({p.rank: p for p in all_of_them}, 10.0)]

    behind = replace(inside, rank=1, step=4, done=90)
    reading = replace(inside, rank=2, operation="reading data", seconds=11.0)
    computing = replace(inside, rank=3, operation="", seconds=0.5)
    assert ranks_named(inside, reading, computing) == [2]
    assert ranks_named(inside, behind, computing) == [1]
    assert ranks_named(inside, replace(inside, rank=1, done=39)) == [1]
    assert ranks_named(reading, replace(reading, rank=3, operation="")) == [2, 3]


def test_following_costs_next_to_nothing() -> None:
    watchdog = Watchdog()
    began = time.perf_counter()
    for _ in range(10_000):
        with watchdog.doing("all_reduce over dp"):
            pass
    assert (time.perf_counter() - began) / 10_000 < 50e-6
