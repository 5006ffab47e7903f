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
    assert stage["recompute_units"][0] == "layers.0.ffn"
    assert stage["peak_memory_bytes"] == result["peak_memory_bytes"] > 18 * params
    assert stage["forward_ms"] < stage["backward_ms"] < result["step_ms"]
    assert sum(unit["total_bytes"] for unit in result["units"]) == 18 * params
    layout = Layout.read(out)
    layout.check(model_preset("smollm2-135m"), 1)
    assert json.loads(layout.to_json()) == result["layout"]


def test_human_output_fits_and_names_the_sum(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "train", str(config)]) == 0
    text = capsys.readouterr().out
    assert "134,515,008 parameters" in text and "30+E+H" in text and "1 process = pp 1" in text
    assert max(map(len, text.splitlines()[2:])) <= 80  # the first has the file's name


def test_experts_in_fp8_take_memory_and_times_of_bf16_and_the_plan_says_so(config, capsys):
    told = "experts in FP8: memory is counted so, times are those of bf16"
    arguments = [str(config), "--set", "data.sequence_length=512", "--set", "model.path=olmoe-1b-7b"]
    same, fp8 = plan(capsys, *arguments), plan(capsys, *arguments, "--set", "model.expert_precision=fp8")
    assert fp8["peak_memory_bytes"] > same["peak_memory_bytes"] and fp8["step_ms"] == same["step_ms"]
    assert told in fp8["why"] and told not in same["why"]
    dense = plan(capsys, str(config), "--set", "model.expert_precision=fp8")
    assert dense["peak_memory_bytes"] == plan(capsys, str(config))["peak_memory_bytes"] and told not in dense["why"]


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
    assert "4 processes = pp 2 x dp 1 x tp 2\nschedule 1f1b, 1 stage a rank" in text
    assert "15+E" in text and "15+H" in text


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


SEARCH = ["--cluster", "1x8-a800", "--set", "parallel.schedule=1f1b", "--set", "parallel.tp=2"]


def plan(capsys, *arguments):
    assert main(["plan", "train", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_on_a_cluster_with_the_uniform_plan_beside_it(tmp_path, capsys):
    out = tmp_path / "plan.json"
    result = plan(capsys, "mistral-7b-v0.3", *SEARCH, "--set", "parallel.pp=4", "--out", str(out))
    model, layout = model_preset("mistral-7b-v0.3"), Layout.read(out)
    layout.check(model, 8)
    assert json.loads(layout.to_json()) == result["layout"]
    assert layout.micro_batch_sequences == result["micro_batch_sequences"]
    assert (result["pp"], result["tp"], result["schedule"]) == (4, 2, "1f1b")
    for figures in (result, result["uniform"]):
        assert len(figures["stages"]) == 4
        assert sum(stage["layers"] for stage in figures["stages"]) == 32
        assert figures["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in figures["stages"])
        assert figures["step_ms"] > 0 and 0 <= figures["bubble_fraction"] < 1 and 0 < figures["mfu"] < 1
        assert "causal" in figures["mfu_convention"]
    assert [stage["layers"] for stage in result["uniform"]["stages"]] == [8, 8, 8, 8]
    assert result["fits"] and result["peak_memory_bytes"] <= result["memory_cap_bytes"]
    assert result["speedup"] == pytest.approx(result["uniform"]["step_ms"] / result["step_ms"])
    assert result["speedup"] >= 1
    assert result["optimality_gap"] < 1e-9
    tokens = result["batch_sequences"] * result["sequence_length"]
    assert result["tokens_per_second_per_gpu"] == pytest.approx(tokens / result["step_ms"] * 1e3 / 8)


def test_what_the_training_file_names_is_kept(config, capsys):
    settings = ["parallel.pp=2", "train.micro_batch_sequences=2", "train.batch_sequences=16"]
    arguments = [word for value in settings for word in ("--set", value)]
    result = plan(capsys, str(config), "--cluster", "1x2-cpu", *arguments)
    assert (result["pp"], result["micro_batch_sequences"], result["batch_sequences"]) == (2, 2, 16)
    free = plan(capsys, str(config), "--cluster", "1x2-cpu", "--set", "train.batch_sequences=16")
    assert free["step_ms"] <= result["step_ms"] and free["considered"] > result["considered"]


def test_a_split_that_is_given_is_only_evaluated(config, capsys):
    settings = ["parallel.pp=2", "parallel.stages=[20, 10]", "parallel.recompute_layers=[5, 0]"]
    arguments = [word for value in settings for word in ("--set", value)]
    result = plan(capsys, str(config), "--cluster", "1x2-cpu", *arguments)
    assert [stage["layers"] for stage in result["stages"]] == [20, 10]
    assert [stage["recompute_layers"] for stage in result["stages"]] == [5, 0]
    assert result["optimality_gap"] is None and result["alternatives"] == []


def test_pictures_traces_and_exports(tmp_path, capsys):
    picture, trace = tmp_path / "step.svg", tmp_path / "trace.json"
    files = ["--timeline", str(picture), "--trace", str(trace)]
    arguments = ["mistral-7b-v0.3", *SEARCH, "--set", "parallel.pp=4", "--whole-layers"]
    result = plan(capsys, *arguments, *files, "--export", "megatron")
    assert picture.read_text().startswith("<?xml") or "<svg" in picture.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    boxes = [event for event in events if event["ph"] == "X" and event["name"].startswith("F")]
    assert len(boxes) == 4 * result["micro_batches"]
    layers = [stage["layers"] for stage in result["stages"]]
    assert result["export"]["text"].count("|") == 3 and f"t*{layers[1]}" in result["export"]["text"]


def test_the_plan_runs_with_its_own_micro_batches(config, tmp_path):
    from moeforge.config.parallel import with_planned_micro_batches
    from moeforge.config.toml import load_config
    from moeforge.errors import UserError

    out = tmp_path / "plan.json"
    settings = ["--set", "train.batch_sequences=16", "--set", "parallel.pp=2"]
    assert main(["plan", "train", str(config), "--cluster", "1x2-cpu", *settings, "--out", str(out)]) == 0
    layout = Layout.read(out)
    run = with_planned_micro_batches(load_config(config, ["train.batch_sequences=16"]), layout)
    assert run.train.micro_batch_sequences == layout.micro_batch_sequences
    other = 2 if layout.micro_batch_sequences != 2 else 8  # neither the plan's nor the default
    with pytest.raises(UserError, match=f"train.micro_batch_sequences = {other}: the plan was made for"):
        with_planned_micro_batches(load_config(config, [f"train.micro_batch_sequences={other}",
                                                        "train.batch_sequences=16"]), layout)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["skywork-mo", "--cluster", "1x8-a800"], 'model preset "skywork-mo": unknown; did you mean skywork-moe?'),
        (["skywork-moe", "--cluster", "1x8-a900"], "did you mean 1x8-a800?"),
        (["skywork-moe", "--cluster", "h100"], "did you mean 1x8-h100? It must be NODESxDEVICES-NAME"),
        (["skywork-moe", "--cluster", "1x8-a800", "--world", "4"], "--world 4: must be absent with --cluster"),
        (["mistral-7b-v0.3", "--cluster", "1x4-4090"], "Smallest changes that fit: 3 nodes (are 1) with "),
        (["mixtral-8x7b", "--cluster", "1x8-h100", "--memory-gbytes", "1"], "has 1.0 GB to use a device"),
        (["mistral-7b-v0.3", *SEARCH, "--set", "parallel.pp=4", "--timeline", "step.gif"], "step.gif"),
        (["mistral-7b-v0.3", *SEARCH, "--set", "parallel.pp=3"], "no pp x dp x tp of the 8 devices"),
        (["mistral-7b-v0.3", *SEARCH, "--set", "parallel.dp=3"], "no pp x dp x tp of the 8 devices"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "train", *arguments, "--out", "plan.json"]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_bad_hardware_profile_names_the_key(tmp_path, capsys):
    from moeforge.bench.calibrate import profile_toml
    from moeforge.config.clusters import DEVICES

    good = profile_toml(DEVICES["cpu"])
    for change, line in (
        (("memory_gbytes_per_second = 12.0", "memory_gbytes_per_second = -1.0"), "must be greater than 0"),
        (("memory_gbytes = 12.0\n", ""), "memory_gbytes: missing"),
        (("memory_gbytes = 12.0", 'memory_gbytes = "much"'), "memory_gbytes = 'much'"),
        (("unit_overhead_us", "unit_overhed_us"), "unit_overhed_us: unknown key; did you mean unit_overhead_us?"),
    ):
        path = tmp_path / "machine.toml"
        assert change[0] in good
        path.write_text(good.replace(*change))
        assert main(["plan", "train", "smollm2-135m", "--cluster", str(path)]) == 2
        captured = capsys.readouterr()
        assert line in captured.err and captured.err.count("\n") == 1


def test_sweep_doubles_and_draws(tmp_path, capsys):
    out = tmp_path / "sweep.svg"
    arguments = ["smollm2-135m", "--device", "a800", "--from", "1", "--to", "4", "--out", str(out), "--json"]
    assert main(["plan", "sweep", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["devices"] for row in rows] == [1, 2, 4] and "<svg" in out.read_text()
    assert all(row["tokens_per_second_per_gpu"] > 0 and 0 < row["mfu"] < 1 for row in rows)
    assert main(["plan", "sweep", "smollm2-135m", "--from", "8", "--to", "4"]) == 2
    assert "--to 4: must be at least --from (8)" in capsys.readouterr().err
