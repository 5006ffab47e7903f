from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeforge.kernels
from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config
from moeforge.errors import UserError
from moeforge.train import prepare
from moeforge.train.determinism import prepare_libraries, repeatable
from moeforge.train.metrics import Row, read_rows

Make = Callable[..., TrainConfig]
Source = Callable[..., Path]
NAMES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE")
TIMES = ("seconds", "tokens_per_second")


def rows_of(config: TrainConfig) -> list[Row]:
    rows = read_rows(Path(config.run.dir) / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def trained(config: TrainConfig) -> tuple[dict[str, Tensor], bool]:
    """This rank's weights after the run, and whether every step was deterministic and nothing after it is."""
    enabled, found = torch.are_deterministic_algorithms_enabled, list[bool]()
    trainer = prepare(config)
    update = trainer.optimizer.step

    def step(lr: float) -> Tensor:
        found.append(enabled())
        return update(lr)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.run(lambda row: found.append(not enabled()))
    weights = {name: p.detach() for chunk in trainer.chunks for name, p in chunk.named_parameters()}
    return weights, all(found) and len(found) == 2 * config.train.steps


def test_two_runs_are_one(source: Source, make_config: Make, run_ranks: Any) -> None:
    """Two ranks share the experts. A third run without the option is the same on CPUs: so nothing reads the memory that
    the option fills with NaN, not even of padding rows, which bf16 has."""
    model = source()
    settings: dict[str, Any] = {
        "model": {"precision": "bf16"}, "train": {"steps": 3}, "router": {"drop_tokens": True},
        "parallel": {"expert_mode": "ep"}, "checkpoint": {"every": 0},
    }  # fmt: skip
    runs = [
        make_config(model, name, run={"deterministic": wanted}, **settings)
        for name, wanted in (("first", True), ("second", True), ("without", False))
    ]
    first, second, without = [run_ranks(2, lambda rank, run=run: trained(run)) for run in runs]
    assert all(on for _, on in first + second) and not any(on for _, on in without)
    assert rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2]) and len(rows_of(runs[0])) == 4
    for (ours, _), (others, _) in zip(first + first, second + without, strict=True):
        assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_runs_on_a_gpu_are_one(source: Source, make_config: Make, tmp_path: Path, precision: str) -> None:
    """Each in a process of its own, as cuBLAS asks for; torch raises for what cannot repeat. Rows that do not divide
    evenly, grouped queries, documents that must not see each other."""
    model = source(hidden_size=128, vocab_size=512, moe={"expert_size": 64, "num_experts": 8})
    runs = []
    for name in ("first", "second"):
        runs.append(
            make_config(model, name, run={"deterministic": True}, model={"precision": precision, "device": "cuda"})
        )
        (tmp_path / name).with_suffix(".toml").write_text(dump_config(runs[-1]))
        command = [sys.executable, "-m", "moeforge", "train", f"{tmp_path / name}.toml", "--json"]
        environment = {key: value for key, value in os.environ.items() if key not in NAMES}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 8, done.stderr[-3000:]
    assert rows_of(runs[0]) == rows_of(runs[1])
    finals = [(Path(run.run.dir) / "final" / "model.safetensors").read_bytes() for run in runs]
    assert finals[0] == finals[1]


def test_libraries_are_told_before_they_start_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    started = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    prepare_libraries()
    assert [os.environ[name] for name in NAMES] == [":4096:8", "0"]
    started = True
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_libraries()  # what is right may come from anywhere
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match='CUBLAS_WORKSPACE_CONFIG is ":0:0"; must be :4096:8 or :16:8 from the start'):
        prepare_libraries()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(UserError, match="is not set, and this process has used a GPU already"):
        prepare_libraries()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    with pytest.raises(UserError, match='run.deterministic = true: NCCL_NVLS_ENABLE is "1"; must be 0'):
        prepare_libraries()


def test_the_mode_ends_with_the_block() -> None:
    with pytest.raises(ZeroDivisionError), repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(True), repeatable(False):
        assert torch.are_deterministic_algorithms_enabled()  # asked for outside


def test_our_kernels_never_add_atomically() -> None:
    """torch knows what its own operations do, but not what these do. Integer maxima know no order."""
    kernels = Path(moeforge.kernels.__file__).parent / "triton"
    sources = {path.name: path.read_text() for path in kernels.glob("*.py")}
    assert "grouped_matmul.py" in sources
    assert not [name for name, source in sources.items() if re.search(r"tl\.atomic_(?!max\b)", source)]
    # Of magnitudes as integers.
    assert [name for name, source in sources.items() if "tl.atomic_max" in source] == ["fp8_training.py"]
