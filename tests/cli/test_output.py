"""`--json` is exactly one JSON object on stdout; without it, something to read."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

from moeforge.cli import app
from moeforge.cli.output import Json, emit


@dataclass
class Stage:
    layers: tuple[int, int]
    loss: float


def test_values_of_every_kind_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "path": Path("runs/a"),
        "loss": float("nan"),
        "bounds": [float("inf"), 1.5],
        "stage": Stage((0, 3), 2.0),
        "count": np.int64(7),
        "load": np.array([0.25, 0.75]),
        "ok": True,
        "nothing": None,
    }
    emit(result, as_json=True, human="not shown")
    assert json.loads(capsys.readouterr().out) == {
        "path": "runs/a",
        "loss": None,
        "bounds": [None, 1.5],
        "stage": {"layers": [0, 3], "loss": 2.0},
        "count": 7,
        "load": [0.25, 0.75],
        "ok": True,
        "nothing": None,
    }


def test_human_forms(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"loss": 2.5, "tokens": 10}, as_json=False)
    assert capsys.readouterr().out == "loss    2.5\ntokens  10\n"
    emit({"text": "x"}, as_json=False, human="[bold] stays as it is")
    assert capsys.readouterr().out == "[bold] stays as it is\n"
    table = Table("layer")
    table.add_row("layers.7.ffn")
    emit({}, as_json=False, human=lambda: table)
    assert "layers.7.ffn" in capsys.readouterr().out


def test_human_form_is_not_built_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": 1}, as_json=True, human=lambda: pytest.fail("built"))
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_chatter_goes_to_stderr_with_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(json: Json = False) -> None:
        print("a library talks")
        emit({"a": 1}, json)
        print("and talks on")

    module = types.ModuleType("moeforge.cli.probe")
    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moeforge.cli.probe", module)
    monkeypatch.setitem(app.VERBS, "probe", "A verb of the tests.")
    assert app.main(["probe", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == '{"a": 1}\n'
    assert captured.err == "a library talks\nand talks on\n"
    assert app.main(["probe"]) == 0
    assert capsys.readouterr().out == "a library talks\na  1\nand talks on\n"
