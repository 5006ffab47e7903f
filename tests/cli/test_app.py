"""The command line's frame: verbs are found and listed, failures are one line with the right exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moeforge import __version__
from moeforge.cli import app
from moeforge.errors import RunError, UserError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers a verb `probe` that runs the given function; returns a function doing so."""

    def register(**attributes: Any) -> None:
        module = types.ModuleType("moeforge.cli.probe")
        for name, value in attributes.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "moeforge.cli.probe", module)
        monkeypatch.setitem(app.VERBS, "probe", "A verb of the tests.")

    return register


def _raise(error: BaseException) -> Any:
    def command() -> None:
        raise error

    return command


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("moeforge: error: ")
    return captured.err.removeprefix("moeforge: error: ").strip()


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in app.VERBS.items():
        assert f"{name} {text}" in shown
    assert "Exit codes: 0 done, 1 a fault while running, 2 bad input, 130 interrupted." in shown


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([]) == 0
    assert "Usage: moeforge" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moeforge {__version__}\n"


@pytest.mark.parametrize("name", app.VERBS)
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([name, "--help"]) == 0
    assert f"Usage: moeforge {name}" in capsys.readouterr().out


def test_unknown_verb_and_option_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["doktor"]) == 2
    assert "'doktor'" in (line := _one_line(capsys)) and "'doctor'" in line
    assert app.main(["doctor", "--jsno"]) == 2
    assert "--jsno" in (line := _one_line(capsys)) and "--json" in line


def test_verb_with_sub_verbs(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def first(count: int) -> None:
        """The first one."""
        print(count + 1)

    verb(commands={"first": first})
    assert app.main(["probe", "first", "4"]) == 0
    assert capsys.readouterr().out == "5\n"
    assert app.main(["probe", "first", "four"]) == 2
    assert "four" in (line := _one_line(capsys)) or "integer" in line
    assert app.main(["probe", "frist"]) == 2
    assert "'first'" in _one_line(capsys)
    assert app.main(["probe"]) == 2
    assert "'moeforge probe --help'" in _one_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("moe.top_k = 9: must be\nat most 8"), 2, "moe.top_k = 9: must be at most 8"),
        (RunError("lost shard 3; saved: runs/a"), 1, "lost shard 3; saved: runs/a"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x.safetensors"),
            1,
            "no space left on device while writing out/x.safetensors: make room and run the command again",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            1,
            "no space left on device: make room and run the command again",
        ),
        (
            ValueError("I/O error: No space left on device (os error 28)"),
            1,
            "no space left on device: make room and run the command again",
        ),
    ],
)
def test_failures_are_one_line(
    verb: Any, capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    verb(command=_raise(error))
    assert app.main(["probe"]) == code
    assert _one_line(capsys) == line


def test_full_disk_deep_inside(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("could not serialise")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    verb(command=_raise(error))
    assert app.main(["probe"]) == 1
    assert "no space left" in _one_line(capsys)


def test_unforeseen_error_keeps_its_traceback_only_when_asked(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(command=_raise(ZeroDivisionError("division by zero")))
    monkeypatch.delenv("MOEFORGE_DEBUG", raising=False)
    assert app.main(["probe"]) == 1
    assert "ZeroDivisionError: division by zero" in (line := _one_line(capsys)) and "MOEFORGE_DEBUG=1" in line
    monkeypatch.setenv("MOEFORGE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        app.main(["probe"])


def test_interrupt(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(command=_raise(KeyboardInterrupt()))
    assert app.main(["probe"]) == 130
    assert capsys.readouterr().out == ""


def test_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "moeforge", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeforge", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["cpu_cores"] >= 1 and result["disk_free_bytes"] > 0
    assert isinstance(result["notes"], list)
