"""`moeforge plan train`: the numbers, the layout file, and mistakes."""

import json
import subprocess
import sys

import pytest

from moeforge.cli.app import main
from moeforge.config.hf import model_config_to_hf
from moeforge.config.presets import model_preset
from moeforge.layout import Layout


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "smollm2-135m"\n[[data.train]]\npath = "a.txt"\n')
    return path


def test_json_and_the_layout_that_training_reads(config, tmp_path, capsys):
    out = tmp_path / "plan" / "layout.json"
    arguments = ["--set", "model.recompute=ffn", "--out", str(out), "--json"]
    assert main(["plan", "train", str(config), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    params = 134_515_008
    assert result["params_total"] == params and result["world_size"] == 1
    assert (result["weight_bytes"], result["gradient_bytes"]) == (2 * params, 4 * params)
    assert (result["optimizer_bytes"], result["total_bytes"]) == (12 * params, 18 * params)
    (stage,) = result["stages"]
    assert (stage["layers"], stage["units"], stage["recompute_layers"]) == (30, [0, 62], 30)
    assert stage["recompute_units"][0] == "layers.0.ffn" and stage["total_bytes"] == 18 * params
    assert sum(unit["total_bytes"] for unit in result["units"]) == 18 * params
    layout = Layout.read(out)
    layout.check(model_preset("smollm2-135m"), 1)
    assert json.loads(layout.to_json()) == result["layout"]


def test_human_output_fits_and_names_the_sum(config, capsys):
    assert main(["plan", "train", str(config)]) == 0
    text = capsys.readouterr().out
    assert "134,515,008 parameters" in text and "2 + 4 + 12 bytes" in text and "attention" in text


def test_many_processes_and_the_memory_of_each(config, tmp_path, capsys):
    out = tmp_path / "layout.json"
    table = ["pp=2", "tp=3", "stages=[16.5, 13.5]", "recompute_layers=[2, 0]"]
    settings = [word for value in (*table, "zero=true") for word in ("--set", f"parallel.{value}")]
    arguments = [*settings, "--set", "train.micro_batch_sequences=1", "--out", str(out), "--json"]
    assert main(["plan", "train", str(config), "--world", "12", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    model, layout = model_preset("smollm2-135m"), Layout.read(out)
    layout.check(model, 12)
    assert [result[key] for key in ("world_size", "pp", "dp", "tp")] == [12, 2, 2, 3]
    assert [stage["layers"] for stage in result["stages"]] == [16.5, 13.5]
    assert [stage["recompute_layers"] for stage in result["stages"]] == [2, 0]

    # Every parameter has one optimizer state; replicated ones (norms) have six weights, sharded ones two.
    norms = sum(2 * model.hidden_size for _ in range(model.num_layers)) + model.hidden_size
    whole = model.parameters()
    tied = model.vocab_size * model.hidden_size
    ranks = result["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(12))
    assert sum(rank["optimizer_bytes"] for rank in ranks) == 12 * (whole + tied)
    assert sum(rank["weight_bytes"] for rank in ranks) == 2 * (2 * (whole + tied - norms) + 6 * norms)
    for rank in ranks:
        assert rank["total_bytes"] == sum(rank[f"{what}_bytes"] for what in ("weight", "gradient", "optimizer"))
        assert rank["gradient_bytes"] == 4 * rank["params"]

    assert main(["plan", "train", str(config), "--world", "12", *arguments, "--set", "parallel.zero=false"]) == 0
    without = json.loads(capsys.readouterr().out)["ranks"]
    assert all(rank["optimizer_bytes"] == 12 * rank["params"] for rank in without)


def test_the_table_of_many_processes(config, capsys):
    settings = ["--set", "parallel.pp=2", "--set", "parallel.tp=2"]
    assert main(["plan", "train", str(config), *settings]) == 0
    text = capsys.readouterr().out
    assert "4 processes = pp 2 x dp 1 x tp 2; experts: ep 1 x etp 1 x expert_dp 2" in text
    assert "schedule 1f1b, 1 stages a rank" in text and "pp rank" in text


def test_a_directory_with_only_a_config_json_is_enough(config, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(model_config_to_hf(model_preset("mixtral-8x7b"))))
    assert main(["plan", "train", str(config), "--set", f"model.path={model}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params_total"] == 46_702_792_704


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.path=nowhere", "nowhere"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("parallel.tp=2", "parallel.pp = 1, parallel.tp = 2: pp x tp must divide the number of processes (5)"),
        ('model.recompute=["layers.30.ffn"]', 'model.recompute = "layers.30.ffn": not a layer unit'),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, capsys, override, line):
    out = tmp_path / "layout.json"
    assert main(["plan", "train", str(config), "--world", "5", "--set", override, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not out.exists()


def test_help_starts_without_torch():
    code = (
        "import sys; from moeforge.cli.app import main; main(['plan', 'train', '--help']);"
        "assert not {'torch', 'transformers', 'tomli_w'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
