"""`moeforge upcycle` as a user meets it: JSON, the summary, exit codes, a full disk."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.checkpoint import ShardWriter, canonical_shapes, open_checkpoint
from moeforge.cli.app import main
from moeforge.config.model import ModelConfig


def make_dense(directory: Path, seed: int = 0, **changes: Any) -> str:
    config = ModelConfig(
        **{
            "vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
            "head_dim": 8, "ffn_size": 64, **changes,
        }
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    writer = ShardWriter(directory, config)
    for name, shape in canonical_shapes(config).items():
        writer.add(name, torch.randn(shape, generator=rng) * 0.15 + ("norm" in name))
    return str(writer.finish())


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moe"
    code = main(["upcycle", make_dense(tmp_path / "dense"), str(out), "--experts", "4", "--verify", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["params_total"] > result["params_active"] > 0
    assert result["preserves_function"] and result["max_logit_diff"] < result["rounding_bound"] < 1e-3
    assert result["argmax_agreement"] == 1 and result["seconds"] > 0
    assert sys.platform != "linux" or result["peak_anonymous_bytes"] > 0
    moe = open_checkpoint(out).config.moe
    assert moe is not None and (moe.num_experts, moe.top_k, moe.gate_norm) == (4, 2, 1.0)


def test_every_option_arrives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = make_dense(tmp_path / "a"), make_dense(tmp_path / "b", seed=1)
    options = (
        "--experts 8 --top-k 4 --method virtual-group --granularity 4 --gate-norm 0.5 --seed 3 "
        f"--layer-frequency 2 --scaling cube-root --shared first --dtype bf16 --donor {other} --verify"
    )
    assert main(["upcycle", source, str(tmp_path / "out"), *options.split()]) == 0
    made = open_checkpoint(tmp_path / "out")
    assert made.config.moe is not None and made.config.moe.expert_size == 16
    assert made.config.moe.gate_norm == 0.5 and made.config.moe_layers == (1,)
    assert made.dtype("model.norm.weight") == torch.bfloat16
    shown = capsys.readouterr().out
    assert "8 experts, top-4, gate normalisation 0.5" in shown and "does not preserve the function" in shown


@pytest.mark.parametrize(
    "options, line",
    [
        ("--top-k 9", "moe.top_k = 9: must be between 1 and the number of experts (8)"),
        ("--top-k 1", "moe.top_k = 1 with moe.renormalize = true"),
        ("--experts 2 --gate-norm 1.0", "gate normalisation needs at least 3 experts"),
        ("--gate-norm one", "--gate-norm = one: must be a positive number, off or auto"),
        ("--method virtual-group --granularity 3", "granularity = 3: must divide num_experts (8)"),
        ("--method clone", "clone"),
        ("--text nowhere.txt", "--text: is only read with --verify"),
        ("--text nowhere.txt --verify", "--text = 'nowhere.txt': cannot be read"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, line: str) -> None:
    code = main(["upcycle", make_dense(tmp_path / "dense"), str(tmp_path / "out"), *options.split()])
    error = capsys.readouterr().err
    assert code == 2 and line in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.slow  # as in test_full_disk.py, in processes of their own
def test_full_disk_keeps_what_is_written_and_goes_on(tmp_path: Path) -> None:
    source, out = make_dense(tmp_path / "dense", ffn_size=512), tmp_path / "out"
    command = [sys.executable, "-m", "moeforge", "upcycle", source, str(out)]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert full.returncode == 1 and not out.exists()
    assert "disk is full" in full.stderr.splitlines()[-1] and "Traceback" not in full.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert open_checkpoint(out).config.moe is not None
