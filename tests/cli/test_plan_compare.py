"""`moeforge plan compare`: the rows, the table and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moeforge.cli.app import main
from moeforge.config.hf import model_config_to_hf
from moeforge.config.presets import model_preset

FLAGSHIP = ["skywork-moe", "--cluster", "192x8-a800", "--pp", "12", "--tp", "4"]
SHAPE = ["skywork-moe", "--cluster", "8x8-h100", "--pp", "4", "--tp", "4"]


def test_json_of_the_flagship(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "compare", *FLAGSHIP, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [result[key] for key in ("world_size", "pp", "dp", "tp", "schedule")] == [1536, 12, 32, 4, "1f1b"]
    assert result["micro_batches"] * 32 * result["micro_batch_sequences"] == result["batch_sequences"]
    edp, ep, etp, *mixtures = result["modes"]
    assert [row["mode"] for row in (edp, ep, etp)] == ["edp", "ep", "etp"]
    assert (edp["feasible"], edp["fits"], edp["tokens_across_bytes"]) == (True, True, 0)
    assert edp["step_seconds"] > edp["tokens_exposed_seconds"] > 0
    tokens = result["batch_sequences"] * result["sequence_length"]
    assert edp["tokens_per_second_per_gpu"] == pytest.approx(tokens / 1536 / edp["step_seconds"])
    assert not ep["feasible"] and ep["reason"] == "needs 128 experts, the model has 16" and ep["step_seconds"] is None
    assert not etp["feasible"] and etp["reason"] == "needs 32 experts, the model has 16"
    assert len(mixtures) == 9 and {row["mode"] for row in mixtures} == {"custom"}


def test_the_table_fits_110_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["plan", "compare", *SHAPE, "--overlap-chunks", "4", "--imbalance", "1.3"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    shown = {tuple(line.split()[:4]) for line in text.splitlines()}
    assert {("EDP", "4", "1", "4"), ("EP", "16", "1", "1"), ("ETP", "4", "4", "1"), ("mixed", "8", "1", "2")} <= shown
    assert "82.3 GB of the 78.7 GB" in text and "overlap chunks 4, imbalance 1.3" in text
    assert "tensor-parallel regions, in every mode" in text


def test_a_config_json_and_given_sizes_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_hf(model_preset("mixtral-8x7b"))))
    sizes = {
        "pp": 2, "tp": 2, "dp": 4, "micro-batch-sequences": 2, "sequence-length": 1024, "batch-sequences": 64,
        "schedule": "interleaved-1f1b", "precision": "bf16_pure",
    }  # fmt: skip
    arguments = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    assert main(["plan", "compare", str(tmp_path), "--cluster", "2x8-h200", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key, value in sizes.items():
        assert result[key.replace("-", "_")] == value
    assert (result["chunks"], result["micro_batches"]) == (2, 8)
    assert all(row["feasible"] for row in result["modes"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["skywork-moe", "--cluster", "8x8-h1000"], 'cluster "8x8-h1000": unknown; did you mean 8x8-h100?'),
        (["skywork-13b", "--cluster", "8x8-h100"], "skywork-13b: is a dense model; compare needs a mixture of experts"),
        (["nowhere", "--cluster", "8x8-h100"], "nowhere"),
        (["skywork-moe"], "--cluster"),
        (["skywork-moe", "--cluster", "8x8-h100", "--pp", "3"], "pp x tp must divide the number of devices of 8x8"),
        ([*SHAPE, "--dp", "3"], "--pp 4, --dp 3, --tp 4: pp x dp x tp must be the number of devices of 8x8-h100 (64)"),
        ([*SHAPE, "--precision", "fp64"], 'model.precision = "fp64": the hardware profile 8x8-h100 has no matmul.fp64'),
        ([*SHAPE, "--precision", "fp8"], "fp8"),
        ([*SHAPE, "--batch-sequences", "30"], "--batch-sequences 30: must be a multiple of dp x micro-batch-sequences"),
        ([*SHAPE, "--batch-sequences", "8"], "needs at least as many micro-batches as stages (4), but a step has 2"),
        ([*SHAPE, "--sequence-length", "9000"], "--sequence-length 9000: must be at most the model's positions (8192)"),
        ([*SHAPE, "--imbalance", "0.5"], "--imbalance 0.5: must be a number from 1 on"),
        ([*SHAPE, "--imbalance", "nan"], "--imbalance nan: must be a number from 1 on"),
        (["skywork-moe", "--cluster", "8x8-h100", "--pp", "64"], "--pp 64: 64 stages must be at most the model's num"),
        (["skywork-moe", "--cluster", "8x8-h100", "--schedule", "zbv"], "--schedule zbv: needs --pp 2 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "compare", *arguments, "--json"]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; from moeforge.cli.app import main; main(['plan', 'compare', '--help']);"
        "assert not {'torch', 'transformers', 'tomli_w'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
