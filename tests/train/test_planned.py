"""What `plan train` writes, torchrun trains unchanged: same losses as one process, recomputation and all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from moeforge.cli.app import main
from moeforge.config.schema import TrainConfig
from moeforge.layout import Layout
from moeforge.train import prepare
from moeforge.train.metrics import read_rows

Make = Callable[..., TrainConfig]
Source = Callable[..., Path]


def write(config: TrainConfig, path: Path) -> Path:
    """Only the keys that were set: the planner chooses the others."""
    path.write_text(tomli_w.dumps(config.model_dump(exclude_unset=True, mode="json")))
    return path


def plan(capsys: pytest.CaptureFixture[str], config: Path, out: Path, *options: str) -> dict[str, Any]:
    arguments = ["--cluster", "1x2-cpu", "--set", "parallel.pp=2", "--out", str(out), "--json", *options]
    assert main(["plan", "train", str(config), *arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_plan_that_recomputes_runs_under_torchrun_as_one_process_does(
    source: Source, make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = source(num_layers=4, max_positions=64)
    settings: dict[str, Any] = {
        "model": {"precision": "fp64"}, "train": {"steps": 3, "batch_sequences": 8, "micro_batch_sequences": 2},
        "data": {"sequence_length": 64}, "eval": {"every": 0}, "checkpoint": {"every": 0},
    }  # fmt: skip
    alone = make_config(model, "alone", **settings)
    prepare(alone).run()
    many = make_config(model, "many", **settings)
    file, out = write(many, tmp_path / "many.toml"), tmp_path / "plan.json"
    roomy = plan(capsys, file, out, "--set", "parallel.schedule=1f1b")
    again = 0
    for share in (0.98, 0.95, 0.9, 0.85, 0.8, 0.75):  # less memory, until something has to be recomputed
        cap = str(roomy["peak_memory_bytes"] * share / 1e9)
        tight = ["--memory-gbytes", cap, "--set", "parallel.schedule=1f1b"]
        result = plan(capsys, file, out, *tight)
        again = sum(len(stage["recompute_units"]) for stage in result["stages"])
        if again:
            break
    assert again and result["peak_memory_bytes"] < roomy["peak_memory_bytes"]
    assert Layout.read(out).micro_batch_sequences == 2

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeforge"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [*command, "train", str(file), "--plan", str(out)], env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows, wanted = (read_rows(Path(config.run.dir) / "metrics.jsonl") for config in (many, alone))
    losses = [row["loss"] for row in wanted if "loss" in row]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-9) and len(losses) == 3
    assert Layout.read(Path(many.run.dir) / "layout.json") == Layout.read(out)
