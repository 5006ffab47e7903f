"""`moeforge export`: a training checkpoint becomes the model that training would have written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.cli.app import main

Model = Callable[..., Path]
TrainFile = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, model: Model, train_file: TrainFile, capfd: pytest.CaptureFixture[str]) -> Path:
    """A finished run of a mixture whose last checkpoint is that of its last step."""
    assert main(["train", str(train_file(model("moe"))), "--json"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_last_checkpoint_is_the_final_model(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(newest(run)), str(out), "--to", "hf", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    config = open_checkpoint(out).config
    assert result["path"] == str(out) and result["dtype"] == "float32" and result["seconds"] > 0
    assert result["params_total"] == config.parameters() > result["params_active"] == config.parameters(active=True)
    assert contents(out) == contents(run / "final")
    earlier = tmp_path / "earlier"
    assert main(["export", str(run / "checkpoints" / "step-00000002"), str(earlier)]) == 0
    assert "M parameters, float32" in capfd.readouterr().out
    assert contents(earlier).keys() == contents(out).keys() and contents(earlier) != contents(out)
    text = ["--prompt", "w1 w2", "--max-tokens", "2", "--device", "cpu"]
    assert main(["generate", str(earlier), *text]) == 0


def test_weights_have_the_precision_of_the_run(tmp_path: Path, model: Model, train_file: TrainFile) -> None:
    for precision in ("bf16", "bf16_pure"):
        run, out = tmp_path / precision, tmp_path / f"{precision}-out"
        changes = {"model": {"precision": precision}, "run": {"dir": str(run)}}
        shutil.rmtree(tmp_path / "moe", ignore_errors=True)
        assert main(["train", str(train_file(model("moe"), **changes))]) == 0
        assert main(["export", str(newest(run)), str(out)]) == 0
        assert open_checkpoint(out).dtype("model.norm.weight") == torch.bfloat16
        assert contents(out) == contents(run / "final")


def test_a_run_whose_model_has_gone(run: Path, tmp_path: Path, model: Model, refused: Refused) -> None:
    shutil.rmtree(tmp_path / "moe")
    out = tmp_path / "out"
    line = refused(["export", str(newest(run)), str(out)])
    assert "no such directory" in line and "--tokenizer-from" in line
    assert main(["export", str(newest(run)), str(out), "--tokenizer-from", str(model())]) == 0
    assert contents(out) == contents(run / "final")


def test_bad_input(run: Path, tmp_path: Path, refused: Refused) -> None:
    out = str(tmp_path / "out")
    assert "--to gguf: must be hf" in refused(["export", str(newest(run)), out, "--to", "gguf"])
    for other in (run, run / "final", tmp_path / "nowhere"):
        assert f"{other}: not a training checkpoint" in refused(["export", str(other), out])
    assert "already exists and is not empty" in refused(["export", str(newest(run)), str(run / "final")])
    manifest = newest(run) / "trainer.json"
    whole = manifest.read_text()
    for part in ("model", "config"):
        data = json.loads(whole)
        data[part] = {}
        manifest.write_text(json.dumps(data))
        assert str(newest(run)) in refused(["export", str(newest(run)), out])
    manifest.write_text(whole)
    for file in [path for path in newest(run).iterdir() if path != manifest]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert f"{file}: cannot be read" in refused(["export", str(newest(run)), out])
        file.write_bytes(content)


def test_other_verbs_point_here(run: Path, text: Path, refused: Refused) -> None:
    checkpoint = str(newest(run))
    for arguments in (["inspect", checkpoint], ["eval", checkpoint], ["generate", checkpoint, "--prompt", "w1"]):
        assert f"a training checkpoint; `moeforge export {checkpoint} OUT`" in refused(arguments)
