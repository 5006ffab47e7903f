"""The environment that torchrun sets, whole and broken, and processes that really join."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moeforge.errors import UserError
from moeforge.parallel import launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_process_and_nothing_to_join() -> None:
    assert (launch.world_size(), launch.world_rank(), launch.local_world_size()) == (1, 0, 1)
    launch.initialise(CPU, 10.0)
    assert not dist.is_initialized()
    threads = threading.active_count()
    launch.start_watchdog(10.0)
    assert threading.active_count() == threads
    launch.shut_down()


def test_torchrun_with_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("0", "1", "0", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    launch.initialise(CPU, 10.0)
    assert not dist.is_initialized() and launch.local_device(CUDA) == CUDA


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, 'WORLD_SIZE = "two": must be a whole number'),
        ({"WORLD_SIZE": "-2"}, 'WORLD_SIZE = "-2": must be a whole number'),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2: MASTER_ADDR is not set; start the processes with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 'RANK = "2": must be less than'),
    ],
)
def test_a_broken_environment_is_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch.initialise(CPU, 10.0)
    assert not dist.is_initialized()


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert launch.local_device(CPU) == CPU
    assert (
        launch.local_device(torch.device("cuda:1")) == torch.device("cuda:1") and not taken
    )  # one process: its choice
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for given in (CUDA, torch.device("cuda:0")):  # what auto and cuda become
        assert launch.local_device(given) == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1")] * 2
    with pytest.raises(UserError, match=r"model.device = 'cuda:1': must be auto or cuda"):
        launch.local_device(torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK = 2: must be less than the number of GPUs \(2\)"):
        launch.local_device(CUDA)


def torchrun(path: Path, ranks: int, script: str, *options: str, timeout: float = 60.0) -> tuple[int, str, str]:
    """Run `script` in `ranks` processes of torchrun."""
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run(
        [*command, *options, str(path)], text=True, env=environment, capture_output=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


JOIN = """
import os, threading, time, torch, torch.distributed as dist
from moeforge.parallel import launch
launch.initialise(torch.device("cpu"), 10.0)
launch.initialise(torch.device("cpu"), 10.0)  # once is enough
first = launch.start_watchdog(10.0)
launch.start_watchdog(10.0)
names = [thread.name for thread in threading.enumerate()]
total = torch.tensor(launch.world_rank() + 1)
if dist.is_initialized():
    dist.all_reduce(total)
launch.shut_down()
after = "watchdog" in [thread.name for thread in threading.enumerate()]
print(f"rank {launch.world_rank()}: {launch.world_size()}, {launch.local_world_size()}, sum {total}, "
      f"{names.count('watchdog')} watching, {after} {dist.is_initialized()}\\n", end="", flush=True)
"""


def test_processes_of_torchrun_join_and_leave(tmp_path: Path) -> None:
    """A second `start_watchdog`, as of a second run in the process, replaces the first; leaving stops it."""
    code, out, err = torchrun(tmp_path / "join.py", 2, JOIN)
    assert code == 0, err
    assert sorted(out.split("\n")) == ["", *(f"rank {r}: 2, 2, sum 3, 1 watching, False False" for r in range(2))]


RESTART = """
import os, time, torch, torch.distributed as dist
from moeforge.parallel import launch
launch.initialise(torch.device("cpu"), 2.0)
watchdog = launch.start_watchdog(2.0)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and launch.world_rank() == 1:
    with watchdog.doing("reading data"):
        time.sleep(60)
total = torch.ones(1)
with watchdog.doing("all_reduce over world"):
    dist.all_reduce(total)
print(f"rank {launch.world_rank()} of attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}: {total.item()}\\n", end="")
launch.shut_down()
"""


@pytest.mark.slow
def test_a_hang_is_named_and_torchrun_starts_again(tmp_path: Path) -> None:
    code, out, err = torchrun(tmp_path / "restart.py", 2, RESTART, "--max-restarts", "1", "--monitor-interval", "0.2")
    assert code == 0, err
    assert sorted(out.split("\n")) == ["", *(f"rank {rank} of attempt 1: 2.0" for rank in range(2))]
    named = [line for line in err.splitlines() if "moeforge: error" in line]
    assert len(named) == 1 and "waiting for rank 1: step 0, reading data, for" in named[0], err
