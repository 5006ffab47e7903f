"""`moeforge quantize`, and the verbs that take what it makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.cli.app import main
from moeforge.cli.quantize import REPORT

from .conftest import SIZES, TEXT

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def of(*arguments: object) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return of


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    ("scales", "activations", "rounding"),
    [
        ("block128", "none", "nearest"),
        ("channel", "dynamic", "nearest"),
        ("tensor", "static", "nearest"),
        ("block128", "none", "gptq"),
        ("channel", "static", "gptq"),
    ],
)
def test_quantize_then_eval_then_plan(
    scales: str, activations: str, rounding: str, run: Run, model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source, out = model("moe"), tmp_path / "fp8"
    arguments = ["--scales", scales, "--activations", activations, "--text", text, "--keep", "layers.1.self_attn"]
    if activations == "static" or rounding == "gptq":
        arguments += ["--calibration", text]
    result = run("quantize", source, out, *arguments, "--rounding", rounding)
    assert result["rounding"] == rounding
    assert result == json.loads((out / REPORT).read_text())
    assert result["kept"] == ["layers.1.attention.qkv", "layers.1.attention.o"]
    assert 0.2 < result["bytes_after"] / result["bytes_before"] < 0.6
    before, after = (run("eval", path, "--text", text) for path in (source, out))
    assert result["perplexity_before"] == pytest.approx(before["perplexity"], rel=1e-5)
    assert result["perplexity_after"] == pytest.approx(after["perplexity"], rel=1e-3)
    assert result["perplexity_after"] == pytest.approx(result["perplexity_before"], rel=0.05)
    assert result["perplexity_after"] != result["perplexity_before"]
    assert result["perplexity_tokens"] == after["tokens"] == 599
    errors = list(result["largest_errors"].values())
    assert len(errors) == 10 and errors == sorted(errors, reverse=True) and 0.01 < errors[-1] <= errors[0] < 0.05
    planned = run("plan", "serve", out, "--gpus", "2x4090")
    assert planned["weights"] == "fp8"


def test_what_is_printed(model: Callable[..., Path], text: Path, tmp_path: Path, capsys: Any) -> None:
    texts = ["--text", str(text), "--calibration", str(text)]
    assert main(["quantize", str(model("dense")), str(tmp_path / "out"), *texts]) == 0
    shown = capsys.readouterr()
    assert "scales by block128, activations none, rounding gptq" in shown.out
    assert "perplexity" in shown.out and "599 tokens" in shown.out and "self_attn.q_proj.weight" in shown.out
    assert f"hidden_size = {SIZES['hidden_size']}" in shown.err and "other engines misread" in shown.err


def test_without_a_tokenizer_there_is_no_perplexity(
    run: Run, model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = model("dense")
    for file in open_checkpoint(source).tokenizer_files:
        file.unlink()
    result = run("quantize", source, tmp_path / "out", "--scales", "channel")
    assert result["perplexity_before"] is result["perplexity_after"] is None and result["perplexity_tokens"] == 0
    assert result["rounding"] == "nearest"
    texts = [["--text", str(text)], ["--calibration", str(text)]]
    for more in (*texts, ["--activations", "static", "--scales", "tensor"], ["--rounding", "gptq"]):
        assert main(["quantize", str(source), str(tmp_path / "no"), *more]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "router"], "--keep router: no matrix is called so"),
        (["--activations", "static"], "scales = 'block128'"),
        (
            ["--calibration", "x.txt", "--rounding", "nearest"],
            "--calibration: is only read with --activations static or --rounding gptq",
        ),
        (["--rounding", "up"], "'up' is not one of"),
        (["--format", "fp4"], "'fp4' is not"),
        (["--scales", "row"], "'row' is not one of"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--max-tokens", "0"], "max_tokens = 0: must be at least 1"),
        (["--device", "tpu"], "device = 'tpu'"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, model: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(model("dense")), str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and not out.exists()


def test_it_is_not_done_twice(model: Callable[..., Path], run: Run, text: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = model("dense"), tmp_path / "out"
    run("quantize", source, out, "--text", text, "--rounding", "nearest")
    assert main(["quantize", str(out), str(tmp_path / "again")]) == 2
    assert "is FP8 already" in capsys.readouterr().err
    assert main(["quantize", str(source), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_an_fp8_source_is_dequantised_for_upcycling(
    model: Callable[..., Path], run: Run, text: Path, tmp_path: Path
) -> None:
    run("quantize", model("dense"), tmp_path / "fp8", "--text", text, "--rounding", "nearest")
    result = run("upcycle", tmp_path / "fp8", tmp_path / "moe", "--experts", "4", "--verify")
    assert result["max_logit_diff"] <= result["rounding_bound"]
    assert open_checkpoint(tmp_path / "moe").config.quantization is None
