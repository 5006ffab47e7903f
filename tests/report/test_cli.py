"""`moeforge report`, as typed."""

from __future__ import annotations

import json
import subprocess
import sys

from moeforge.cli.app import main


def test_json(fake_run, tmp_path, capsys):
    paths = [fake_run("a", steps=5, layers=2), fake_run("b", steps=5, experts=None)]
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in result["runs"]] == ["a", "b"]
    assert result["runs"][1]["drop_rate"] is None
    assert (tmp_path / "page.html").stat().st_size == result["bytes"]


def test_human_output_names_the_page_and_the_notes(fake_run, capsys):
    path = fake_run("a", steps=5, layers=2)
    (path / "model.json").unlink()
    assert main(["report", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(str(path / "report.html")) and out[1] == "a: model.json is missing."


def test_bad_run_is_exit_code_2(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "nowhere" in captured.err and captured.out == ""


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, moeforge.report; assert not {'matplotlib', 'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
