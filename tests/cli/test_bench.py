"""The verb around the benchmark; tests/bench measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeforge.cli.app import main

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("options", "line"),
    [("--runs 0", "--runs"), ("--only ratio_fp8", "--only ratio_fp8: must be one of"), ("--against nobody", "nobody")],
)
def test_options(options: str, line: str, refused: Refused, model: Callable[..., Path]) -> None:
    assert line in refused(["bench", "train", "--model", str(model()), *options.split()])


def test_out_holds_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Callable[..., Path], tmp_path: Path
) -> None:
    monkeypatch.setattr("moeforge.bench.train.TrainBench.run", lambda bench, names: dict.fromkeys(names, 2.0))
    arguments = ["bench", "train", "--model", str(model()), "--only", "ratio_fp32", "--json", "--out"]
    assert main([*arguments, str(tmp_path / "new" / "bench.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "new" / "bench.json").read_text()) == printed == {"ratio_fp32": 2.0}
    assert main([*arguments, str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == printed and err.endswith("new: cannot be written (Is a directory)\n")
