"""Real torchrun: restarts after a kill, ranks that hang, input that does not fit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config
from moeforge.train.metrics import read_rows

Make = Callable[..., TrainConfig]
Source = Callable[..., Path]
EXACT = ("step", "loss", "grad_norm", "lr", "moe")


def torchrun(program: list[str], ranks: int, restarts: int = 0) -> subprocess.Popen[str]:
    """`program` in `ranks` processes, all in a process group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen(
        command, text=True, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start(config: TrainConfig, path: Path, ranks: int, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun -m moeforge train`."""
    path.write_text(dump_config(config))
    return torchrun(["-m", "moeforge", "train", str(path), "--json"], ranks, restarts)


def finish(process: subprocess.Popen[str], timeout: float = 150) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s\n{err[-3000:]}")
    return process.returncode, out, err


def exact_rows(config: TrainConfig) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in EXACT} for row in read_rows(Path(config.run.dir) / "metrics.jsonl")]


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The rank processes, in order of rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                environment = entry.joinpath("environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue
            ranks = [item for item in environment if item.startswith(b"RANK=")]
            if parent == process.pid and ranks:
                found[int(ranks[0][5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not any(row["step"] >= step for row in read_rows(Path(config.run.dir) / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)


LAYOUT = {"pp": 2, "hang_timeout_seconds": 20.0}


def many_steps(make_config: Make, model: Path, name: str, **parallel: Any) -> TrainConfig:
    return make_config(
        model, name, train={"steps": 40}, eval={"every": 0}, checkpoint={"every": 5}, parallel=LAYOUT | parallel
    )


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_ranks_end_in_a_resumed_run_with_exact_losses(
    source: Source, make_config: Make, tmp_path: Path, run_ranks: Any, kills: int
) -> None:
    from moeforge.train import prepare

    model = source()
    whole, cut = many_steps(make_config, model, "whole"), many_steps(make_config, model, "cut")
    assert run_ranks(2, lambda rank: prepare(whole).run().steps) == [40, 40]

    process = start(cut, tmp_path / "cut.toml", 2, restarts=kills)
    choice = random.Random(7)
    for step in sorted(choice.sample(range(3, 36), kills)):
        wait_for_step(cut, step, process)
        os.kill(choice.choice(rank_pids(process)), signal.SIGKILL)
        time.sleep(0.5)
    code, out, err = finish(process)
    assert code == 0, err[-3000:]
    assert json.loads(out)["steps"] == 40
    assert exact_rows(cut) == exact_rows(whole)


def test_a_rank_that_stands_still_is_named(source: Source, make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        source(), train={"steps": 5000}, eval={"every": 0}, checkpoint={"every": 0},
        parallel={"tp": 2, "hang_timeout_seconds": 6.0},
    )  # fmt: skip
    process = start(config, tmp_path / "config.toml", 2)
    wait_for_step(config, 3, process)
    stopped = rank_pids(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    deadline = began + 40
    # torchrun waits for a stopped process as long as it likes; the message is what matters, and that rank 0 ends.
    line = ""
    assert process.stderr is not None
    while "no progress" not in line and time.monotonic() < deadline:
        line = process.stderr.readline()
    os.kill(stopped, signal.SIGKILL)
    code, _, _ = finish(process, 60)
    assert "no progress for 6 seconds" in line and "waiting for rank 1: step" in line, line
    assert time.monotonic() - began < 60 and code != 0


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        pytest.param({"tp": 3}, "parallel.tp = 3", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "schedule": "zbv"}, 'parallel.schedule = "zbv"', marks=pytest.mark.slow),
        ({"pp": 2, "stages": [1, 2]}, "parallel.stages = [1, 2]: must sum to the model's 2 layers"),
    ],
)
def test_bad_input_is_one_message_and_no_hang(
    parallel: dict[str, Any], message: str, source: Source, make_config: Make, tmp_path: Path
) -> None:
    code, out, err = finish(start(make_config(source(), parallel=parallel), tmp_path / "config.toml", 2), 60)
    lines = [line for line in err.splitlines() if "moeforge: error" in line]
    assert code != 0 and not out
    assert len(lines) == 1 and message in lines[0], err[-2000:]
    assert not Path(tmp_path / "run").exists()


def test_a_rank_that_fails_before_it_has_joined_says_why(source: Source, make_config: Make, tmp_path: Path) -> None:
    """As on a machine where the training file is missing."""
    config, path = make_config(source(), parallel={"dp": 2}), tmp_path / "config.toml"
    path.write_text(dump_config(config))
    script = tmp_path / "rank.sh"
    there = f"exec {sys.executable} -m moeforge train"
    script.write_text(f'#!/bin/sh\nif [ "$RANK" = 1 ]; then {there} {tmp_path}/missing.toml; fi\n{there} {path}\n')
    script.chmod(0o755)
    code, out, err = finish(torchrun(["--no-python", str(script)], 2), 90)
    lines = [line for line in err.splitlines() if "moeforge: error" in line]
    assert code != 0 and not out
    assert any("rank 1: " in line and "missing.toml" in line for line in lines), err[-2000:]


def test_ranks_with_different_configurations_are_refused(source: Source, make_config: Make, run_ranks: Any) -> None:
    from moeforge.errors import UserError
    from moeforge.train import prepare

    model = source()

    def train(rank: int) -> str:
        config = make_config(model, optimizer={"lr": 1e-3 * (1 + (rank == 1))}, parallel={"dp": 2})
        try:
            prepare(config)
        except UserError as error:
            return str(error)
        return "prepared"

    first, second = run_ranks(2, train)
    assert (
        first == second == ("the training configuration: rank 1 has another than rank 0; start all ranks with the same")
    )


def test_a_checkpoint_is_read_in_any_other_layout(source: Source, make_config: Make, run_ranks: Any) -> None:
    """Four steps in one layout, the rest in others: the losses of one process throughout (float64)."""
    from moeforge.train import prepare

    model = source(num_layers=3)

    def config(name: str, **parallel: Any) -> TrainConfig:
        return make_config(
            model, name, model={"precision": "fp64"}, train={"steps": 9, "micro_batch_sequences": 1},
            eval={"every": 0}, checkpoint={"every": 3}, parallel=parallel,
        )  # fmt: skip

    def steps(rank: int, given: TrainConfig, until: int) -> None:
        trainer = prepare(given)
        while trainer.step < until:
            trainer.train_step()
        trainer.save()
        trainer.saver.wait()

    def log(rank: int, given: TrainConfig) -> None:
        prepare(given).run()

    alone = config("alone")
    log(0, alone)
    run_ranks(4, lambda rank: steps(rank, config("moved", pp=2, tp=2), 3))
    run_ranks(3, lambda rank: steps(rank, config("moved", tp=3, expert_mode="etp", zero=False), 6))
    run_ranks(2, lambda rank: log(rank, config("moved", dp=2, expert_mode="ep")))
    expected = [row for row in exact_rows(alone) if row["step"] > 6]
    found = exact_rows(config("moved"))
    assert [row["step"] for row in found] == [7, 8, 9]
    for row, wanted in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-7)
        assert [layer["aux_coef"] for layer in row["moe"]] == [layer["aux_coef"] for layer in wanted["moe"]]
