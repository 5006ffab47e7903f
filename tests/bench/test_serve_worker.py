from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

from moeforge.bench import serve_worker
from moeforge.bench.serve_worker import Loaded, Prompts


def test_every_line_is_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(job: dict[str, Any]) -> Loaded:
        def generate(prompts: Prompts, max_tokens: int, mode: str) -> Prompts:
            if mode == "short":
                return [[1] for _ in prompts]
            return [[prompt[-1] + 1] * max_tokens for prompt in prompts]

        return generate, {"version": job["model"]}

    monkeypatch.setitem(serve_worker.SIDES, "fake", load)
    command = {"prompts": [[1, 2], [3, 4]], "max_tokens": 3, "mode": "full"}
    lines = [command, command | {"mode": "short"}, {}, command]
    answers = io.StringIO()
    job = {"side": "fake", "model": "m"}
    serve_worker.serve(job, io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), answers)
    about, full, short, empty, again = map(json.loads, answers.getvalue().splitlines())
    assert about == {"about": {"version": "m"}}
    assert full["first_tokens"] == again["first_tokens"] == [3, 5] and full["seconds"] >= 0
    assert short["error"] == "RuntimeError: asked for 3 tokens each, got [1, 1]"
    assert empty["error"].startswith("KeyError")
    assert "Traceback" in capsys.readouterr().err


def test_its_head_needs_no_package() -> None:
    """It runs where a peer is installed and we are not."""
    code = f"import runpy, sys; runpy.run_path({serve_worker.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", code]).returncode == 0
