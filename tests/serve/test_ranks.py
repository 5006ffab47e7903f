"""Ranks as real processes: in step, and however they end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeforge.checkpoint import load_model, open_checkpoint
from moeforge.config.serving import EngineConfig
from moeforge.errors import RunError, UserError
from moeforge.layout import serving_layout
from moeforge.model import DenseAttention, ForwardContext
from moeforge.serve.ranks import TensorParallelRunner
from moeforge.serve.step import SequenceStep, StepBatch

from .families import family

HERE = Path(__file__).parent
CONFIG = EngineConfig(device="cpu")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worker processes find the runners; nothing of a runner outlives its test."""
    monkeypatch.syspath_prepend(HERE)
    threads = torch.get_num_threads()
    yield
    assert not dist.is_initialized()
    assert torch.get_num_threads() == threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


@contextmanager
def started(
    size: int, on_failure: Callable[[str], None] | None = None, **orders: Any
) -> Iterator[TensorParallelRunner]:
    import fake_runner

    layout = serving_layout(family("llama"), size)
    runner = TensorParallelRunner(CONFIG, json.dumps(orders), layout, fake_runner.odd, on_failure)
    try:
        yield runner
    finally:
        begin = time.monotonic()
        runner.close()
        runner.close()
        assert time.monotonic() - begin < 10


def step(*rows: tuple[int, ...]) -> StepBatch:
    return StepBatch(tuple(SequenceStep(row, 0, (i, i + 1), True) for i, row in enumerate(rows)))


def workers(runner: TensorParallelRunner) -> list[int]:
    return [worker.pid for worker in runner._workers]


def gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listening(pid: int) -> list[str]:
    """The addresses on which a process listens."""
    inodes = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    found = []
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.append(socket.inet_ntop(kind, address))
    return found


@pytest.mark.parametrize(("kind", "size"), [("llama", 2), ("mixtral", 3), ("mixtral", 1)])
def test_logits_are_those_of_one_process(kind: str, size: int, saved: Callable[[str], Path]) -> None:
    import fake_runner

    checkpoint = open_checkpoint(saved(kind))
    layout = serving_layout(checkpoint.config, size, [3, 1, 2][:size])
    rows = ((256, 72, 101, 108), (256, 1, 2, 3), (256, 9, 9, 9))
    runner = TensorParallelRunner(CONFIG, str(checkpoint.path), layout, fake_runner.whole)
    try:
        assert runner.num_blocks == 101 - size
        assert len(workers(runner)) == size - 1
        found = runner.forward(step(*rows))
        alone = runner.forward(step(rows[1]))
    finally:
        runner.close()
    with torch.inference_mode():
        context = ForwardContext(DenseAttention(3, 4))
        model = load_model(checkpoint, torch.float32)
        hidden = model(torch.tensor(rows).flatten(), torch.arange(4).repeat(3), context)
        expected = model.logits(hidden[3::4], context)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, expected[1:2], rtol=1e-4, atol=1e-4)


def test_a_quiet_life() -> None:
    """Idle ranks cost nothing, listen on loopback alone, keep their store to the user, and end when told to."""
    with started(3) as runner:
        assert runner.num_blocks == 10
        assert runner._directory is not None
        directory = runner._directory
        assert directory.stat().st_mode & 0o777 == 0o700
        pids = workers(runner)
        for pid in (os.getpid(), *pids):
            assert set(listening(pid)) <= {"127.0.0.1"}
        assert listening(pids[0])  # so the line above has looked at something
        before = [cpu_seconds(pid) for pid in pids]
        time.sleep(3)
        assert all(cpu_seconds(pid) - then < 0.1 for pid, then in zip(pids, before, strict=True))
        assert runner.forward(step((5,))).item() == 15
        assert runner.forward(step((7,) * 30_000)).item() == 21  # more than a pipe holds
        os.kill(pids[0], signal.SIGTERM)  # a service that stops: rank 0 decides when
        os.kill(pids[0], signal.SIGINT)
        assert runner.forward(step((1,))).item() == 3
        assert runner.failed is None
    assert all(gone(pid) for pid in pids)
    assert not directory.exists()


def test_a_killed_worker_ends_all() -> None:
    told: list[str] = []
    with started(3, told.append) as runner:
        first, second = workers(runner)
        os.kill(second, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runner.failed == told[0]
        assert told[0].startswith(f"rank 2 (pid {second}) was killed by signal 9 (SIGKILL)")
        assert gone(first)
        with pytest.raises(RunError, match="rank 2 .* signal 9"):
            runner.forward(step((1,)))
    assert len(told) == 1


def test_a_worker_killed_during_a_step() -> None:
    with started(3, fails=1, when="forward", how="sleep") as runner:
        first, second = workers(runner)
        threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
        begin = time.monotonic()
        # Rank 2 meets a closed connection at the same time, and is not to blame.
        with pytest.raises(RunError, match=rf"rank 1 \(pid {first}\) was killed by signal 9"):
            runner.forward(step((1,)))
        assert time.monotonic() - begin < 3
        assert gone(second)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("user", UserError, "rank 1: model = 'x': must be another one"),
        pytest.param("memory", RunError, "rank 1: OutOfMemoryError: no memory for 7 GB", marks=pytest.mark.slow),
        pytest.param("exit", RunError, r"rank 1 \(pid \d+\) ended with exit code 3", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_cannot_start(how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), started(2, fails=1, when="start", how=how):
        pass


@pytest.mark.slow
def test_rank_0_that_cannot_start() -> None:
    with pytest.raises(UserError, match="^model = 'x'"), started(2, fails=0, when="start", how="user"):
        pass


@pytest.mark.slow
def test_unequal_caches_are_refused() -> None:
    with pytest.raises(RunError, match=r"\[10, 11\] blocks"), started(2, uneven=True):
        pass


def test_an_error_during_a_step() -> None:
    with started(2, fails=1, when="forward", how="error") as runner:
        with pytest.raises(RunError, match="rank 1: ValueError: something odd"):
            runner.forward(step((1,)))
        assert runner.failed == "rank 1: ValueError: something odd"


def test_an_error_of_rank_0_during_a_step() -> None:
    with started(2, fails=0, when="forward", how="error") as runner:
        with pytest.raises(ValueError, match="something odd"):
            runner.forward(step((1,)))
        assert runner.failed == "rank 0: ValueError: something odd"
        assert all(map(gone, workers(runner)))


def test_a_worker_that_hangs_is_killed_in_the_end() -> None:
    with started(2) as runner:
        (pid,) = workers(runner)
        os.kill(pid, signal.SIGSTOP)
    assert gone(pid, 0.1)


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_end_with_rank_0(busy: bool, tmp_path: Path) -> None:
    orders = {"fails": 0, "when": "forward", "how": "sleep"} if busy else {}
    (tmp_path / "leader.py").write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import fake_runner
from moeforge.config.model import ModelConfig
from moeforge.config.serving import EngineConfig
from moeforge.layout import serving_layout
from moeforge.serve.ranks import TensorParallelRunner
from moeforge.serve.step import SequenceStep, StepBatch
layout = serving_layout(ModelConfig(37, 32, 3, 6, 3, 8, 80), 3)
runner = TensorParallelRunner(EngineConfig(device="cpu"), {json.dumps(orders)!r}, layout, fake_runner.odd)
print(runner._directory, *(worker.pid for worker in runner._workers), flush=True)
runner.forward(StepBatch((SequenceStep((1,), 0, (0,), True),)))
import time; time.sleep(3600)
""")
    leader = subprocess.Popen([sys.executable, tmp_path / "leader.py"], stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    directory, pids = Path(), list[int]()
    while len(pids) != 2:  # rank 0 says other things too; the other ranks write to standard error
        line = leader.stdout.readline()
        assert line
        words = line.split()
        directory, pids = Path(words[0]), [int(word) for word in words if word.isdecimal()]
    assert directory.exists()
    time.sleep(0.5)  # the workers are in a sum that rank 0 does not come to, or wait
    leader.kill()
    leader.wait()
    leader.stdout.close()
    assert all(gone(pid, 2) for pid in pids)
    assert not directory.exists()


def test_many_ranks_want_a_gpu_each() -> None:
    if torch.cuda.is_available():
        with pytest.raises(UserError, match="device = 'cuda:0'"):
            TensorParallelRunner(EngineConfig(device="cuda:0"), "", serving_layout(family("llama"), 2), lambda *_: None)
    with pytest.raises(UserError, match="device = 'cuda:99'"):
        TensorParallelRunner(EngineConfig(device="cuda:99"), "", serving_layout(family("llama"), 2), lambda *_: None)
