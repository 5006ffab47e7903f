"""Reading run directories, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeforge.errors import UserError
from moeforge.report.runs import LOAD_ROWS, load_run, load_runs


def test_arrays_are_the_rows(fake_run):
    path = fake_run("a", steps=40, layers=3, experts=4)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    run = load_run(path)
    assert run.name == "a" and run.steps == 40 and run.layers == (0, 1, 2) and run.notes == ()
    assert run["step"].tolist() == [row["step"] for row in rows]
    np.testing.assert_array_equal(run["loss"], [row.get("loss", np.nan) for row in rows])
    np.testing.assert_array_equal(run["eval_loss"], [row.get("eval_loss", np.nan) for row in rows])
    expected = [[layer["drop_rate"] for layer in row["moe"]] for row in rows[1:]]
    np.testing.assert_allclose(run.by_layer["drop_rate"][1:], expected, rtol=1e-6)
    assert np.isnan(run.by_layer["drop_rate"][0]).all()  # step 0 holds only the held-out loss
    known = np.isfinite(run.by_layer["expert_similarity"]).all(axis=1)
    assert run["step"][known].tolist() == [1, 20, 40]
    assert run.model is not None and run.model.moe is not None and run.model.moe.num_experts == 4


def test_load_is_the_mean_of_the_last_rows(fake_run):
    path = fake_run(steps=40, layers=2, experts=4)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    run = load_run(path)
    expected = np.mean([[layer["load"] for layer in row["moe"]] for row in rows[-LOAD_ROWS:]], axis=0)
    np.testing.assert_allclose(run.load, expected)
    assert run.load_rows == LOAD_ROWS
    np.testing.assert_allclose(run.load.sum(axis=1), 1)


def test_first_and_last_gate_distribution_are_kept(fake_run):
    run = load_run(fake_run(steps=40, layers=2, gate_every=15))
    assert [recording.step for recording in run.gates] == [1, 30]
    gate = run.gates[1].layers[1]
    assert gate.normalised[0] > gate.unnormalised[0]
    assert len(load_run(fake_run("one", steps=1, layers=2)).gates) == 1


def test_sparse_layers_keep_their_numbers(fake_run):
    path = fake_run(steps=2, layers=2)
    text = (path / "metrics.jsonl").read_text().replace('"layer": 1', '"layer": 3').replace('"layer": 0', '"layer": 1')
    (path / "metrics.jsonl").write_text(text)
    assert load_run(path).layers == (1, 3)


def test_truncated_last_line_is_ignored_with_a_note(fake_run):
    path = fake_run(steps=10, layers=2)
    file = path / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    run = load_run(path)
    assert run.steps == 9
    assert len(run.notes) == 1 and "incomplete" in run.notes[0] and "line 11" in run.notes[0]


def test_unreadable_lines_inside_are_counted(fake_run):
    path = fake_run(steps=10, layers=2)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[3], lines[5] = "garbage", "[1, 2]"
    (path / "metrics.jsonl").write_text("\n".join(lines))
    run = load_run(path)
    assert 3 not in run["step"] and 5 not in run["step"] and run.steps == 10
    assert run.notes == ("2 unreadable line(s) of metrics.jsonl were ignored: 4, 6.",)


def test_rows_of_one_step_merge_and_the_later_wins(fake_run):
    path = fake_run(steps=3, experts=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval_loss": 1.25}\n')
    run = load_run(path)
    assert run["step"].tolist() == [0, 1, 2, 3]
    assert run["eval_loss"][-1] == 1.25 and np.isfinite(run["loss"][-1])


def test_nan_and_null_are_missing_numbers(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "lr": null}\n{"step": 2, "loss": 2.5, "moe": [{"layer": 0, "drop_rate": NaN}]}\n'
    )
    run = load_run(tmp_path)
    np.testing.assert_array_equal(run["loss"], [np.nan, 2.5])
    assert np.isnan(run["lr"]).all() and np.isnan(run.by_layer["drop_rate"]).all()
    assert run.notes == (
        "The loss is not a finite number at 1 step(s), first at step 1.",
        "config.toml is missing.",
        "model.json is missing.",
    )


def test_broken_model_json_is_a_note(fake_run):
    path = fake_run(steps=2, layers=2)
    (path / "model.json").write_text('{"vocab_size": 1')
    run = load_run(path)
    assert run.model is None and run.notes == ("model.json could not be read.",)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_no_metrics_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="metrics.jsonl") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory"):
        load_run(tmp_path / "nowhere")


def test_equal_names_are_told_apart(fake_run):
    paths = [fake_run(f"{parent}/run", steps=2, layers=1) for parent in ("first", "second")]
    runs = load_runs([*paths, fake_run("other", steps=2, layers=1)])
    assert [run.name for run in runs] == ["first/run", "second/run", "other"]


def test_relative_paths_have_names(fake_run, monkeypatch):
    monkeypatch.chdir(fake_run("here", steps=2, layers=1))
    assert load_run(Path(".")).name == "here"
