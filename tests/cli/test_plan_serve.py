"""`moeforge plan serve`: the keys, the layout that serving reads, the table, and mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeforge.cli.app import main
from moeforge.config.hf import model_config_to_hf
from moeforge.config.presets import model_preset
from moeforge.layout import Layout

FLAGSHIP = ["plan", "serve", "skywork-moe", "--gpus", "8x4090", "--weights", "fp8"]

Planned = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    def run(*arguments: str) -> dict[str, Any]:
        assert main(["plan", "serve", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_json_of_the_flagship_and_the_layout_that_serving_reads(planned: Planned, tmp_path: Path) -> None:
    out = tmp_path / "plans" / "layout.json"
    result = planned(*FLAGSHIP[2:], "--out", str(out))
    assert (result["fits"], result["kv_tokens"], result["weights"]) == (True, 39_536, "fp8")
    assert [len(rank["heads_by_layer"]) for rank in result["ranks"]] == [52] * 8
    for key in ("heads_by_layer", "kv_heads_by_layer"):
        assert [rank[key][:2] for rank in result["ranks"]] == [[5, 4]] * 4 + [[4, 5]] * 4
    assert {columns for rank in result["ranks"] for columns in rank["ffn_columns_by_layer"]} == {1536}
    assert {rank["kv_tokens"] for rank in result["ranks"]} == {39_536}
    assert all(18.3e9 < rank["weight_bytes"] < 18.4e9 < rank["usable_bytes"] for rank in result["ranks"])
    assert all(rank["step_ms"] > 0 and rank["wait_ms"] >= 0 for rank in result["ranks"])
    assert result["attention_efficiency"] == pytest.approx(0.9)
    assert result["warnings"][0].startswith("attention efficiency 0.90")
    assert [point["batch"] for point in result["curve"]] == [1, 2, 4, 8, 16, 32, 64, 128, 154]
    for point in result["curve"]:
        assert point["tokens_per_second"] == pytest.approx(point["batch"] / point["step_ms"] * 1e3)
    layout = Layout.read(out)
    layout.check(model_preset("skywork-moe"), 8)
    assert json.loads(layout.to_json()) == result["layout"] and result["out"] == str(out)


def test_groups_are_shared_whole(planned: Planned) -> None:
    result = planned("smollm2-135m", "--gpus", "2x4090", "--max-model-len", "4096", "--max-num-seqs", "3")
    assert [rank["kv_heads_by_layer"][:2] for rank in result["ranks"]] == [[2, 1], [1, 2]]
    assert [rank["heads_by_layer"][:2] for rank in result["ranks"]] == [[6, 3], [3, 6]]
    assert result["max_model_len"] == 4096 and [point["batch"] for point in result["curve"]] == [1, 2, 3]


def test_more_ranks_than_groups(planned: Planned) -> None:
    result = planned("qwen2.5-0.5b", "--gpus", "5x4090")
    assert result["fits"] and {min(rank["kv_heads_by_layer"]) for rank in result["ranks"]} == {0}


def test_what_a_split_and_other_options_change(planned: Planned) -> None:
    arguments = ["mixtral-8x7b", "--gpus", "4x4090+1xh200", "--max-model-len", "2048"]
    plain, split = planned(*arguments), planned(*arguments, "--gpu-split", "24,24,24,24,24")
    assert plain["fits"] and plain["kv_tokens"] > split["kv_tokens"]
    assert {sum(rank["kv_heads_by_layer"]) for rank in split["ranks"]} <= {51, 52}
    half = planned(*arguments, "--kv-cache-dtype", "fp8")
    assert half["kv_tokens"] == pytest.approx(2 * plain["kv_tokens"], abs=32)
    less = planned(*arguments, "--gpu-memory-utilization", "0.8", "--context", "512")
    assert less["kv_tokens"] < plain["kv_tokens"] and less["context_tokens"] == 512


def test_what_does_not_fit_is_a_plan_with_remedies(planned: Planned, tmp_path: Path) -> None:
    result = planned("skywork-moe", "--gpus", "8x4090", "--out", str(tmp_path / "plan.json"))
    assert (result["weights"], result["fits"], result["kv_tokens"], result["curve"]) == ("bf16", False, 0, [])
    assert [remedy["options"] for remedy in result["would_fit"]] == ["--weights fp8", "--gpus 14x4090"]
    Layout.read(tmp_path / "plan.json").check(model_preset("skywork-moe"), 8)


def test_weights_are_as_the_model_is_stored(planned: Planned, model: Callable[..., Path], tmp_path: Path) -> None:
    stored = str(model("moe"))
    result = planned(stored, "--gpus", "2x4090")
    assert result["weights"] == "fp32"  # what conftest writes
    assert result["weight_bytes"] > 4 * result["params_total"]
    assert planned(stored, "--gpus", "2x4090", "--weights", "bf16")["weights"] == "bf16"
    for dtype, expected in (("float32", "fp32"), ("bfloat16", "bf16")):
        config = model_config_to_hf(model_preset("olmoe-1b-7b"), dtype)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert planned(str(tmp_path), "--gpus", "1xh200")["weights"] == expected
    quantized = {**config, "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    assert planned(str(tmp_path), "--gpus", "1xh200")["weights"] == "fp8"


def test_what_is_beside_fp8_weights_is_as_the_checkpoint_has_it(
    planned: Planned, capsys: pytest.CaptureFixture[str], model: Callable[..., Path], tmp_path: Path
) -> None:
    """A float32 model quantised: embeddings, and what it computes, are float32 in the server too."""
    from moeforge.checkpoint import open_checkpoint
    from moeforge.checkpoint.inference import pick_dtype
    from moeforge.config.serving import EngineConfig
    from moeforge.serve.kv_cache import bytes_per_block
    from moeforge.serve.memory import weight_bytes

    source, out = str(model("moe")), tmp_path / "fp8"
    assert main(["quantize", source, str(out), "--scales", "tensor"]) == 0
    capsys.readouterr()
    found = planned(str(out), "--gpus", "1x4090")
    assert (found["weights"], found["dtype"]) == ("fp8", "fp32")
    checkpoint = open_checkpoint(out)
    dtype, layout = pick_dtype("auto", checkpoint), Layout.from_json(json.dumps(found["layout"]))
    assert found["weight_bytes"] == weight_bytes(checkpoint.config, layout, 0, dtype)
    groups = [end - begin for begin, end in layout.ranks[0].kv_groups]
    page = bytes_per_block(checkpoint.config, groups, EngineConfig(), dtype)
    assert found["ranks"][0]["kv_bytes_per_token"] * found["block_size_tokens"] == page
    assert planned(source, "--gpus", "1x4090", "--weights", "fp8")["weight_bytes"] == found["weight_bytes"]
    (out / "model.safetensors").unlink()  # config.json alone tells the same
    assert planned(str(out), "--gpus", "1x4090")["weight_bytes"] == found["weight_bytes"]
    assert main(["plan", "serve", str(out), "--gpus", "1x4090"]) == 0
    assert "fp8 weights, fp32 KV cache" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("scales", ["tensor", "channel", "block128"])
@pytest.mark.parametrize("keep", [[], ["--keep", "o_proj", "--keep", "layers.1.mlp"]], ids=["all", "some kept"])
def test_a_plan_of_an_fp8_checkpoint_is_what_its_ranks_load(
    planned: Planned, capsys: pytest.CaptureFixture[str], model: Callable[..., Path], tmp_path: Path, scales: str,
    keep: list[str],
) -> None:  # fmt: skip
    from moeforge.checkpoint import open_checkpoint
    from moeforge.checkpoint.inference import pick_dtype
    from moeforge.serve.load import load_rank

    out = tmp_path / "fp8"
    assert main(["quantize", str(model()), str(out), "--scales", scales, *keep]) == 0
    capsys.readouterr()
    found, checkpoint = planned(str(out), "--gpus", "3x4090"), open_checkpoint(out)
    layout = Layout.from_json(json.dumps(found["layout"]))
    for rank in found["ranks"]:
        loaded = load_rank(checkpoint, layout, rank["rank"], pick_dtype("auto", checkpoint))
        assert rank["weight_bytes"] == sum(parameter.nbytes for parameter in loaded.parameters())
    assert planned(str(out), "--gpus", "3x4090", "--weights", "bf16")["weights"] == "bf16"


@pytest.mark.parametrize(
    "arguments",
    [
        ["skywork-moe", "--gpus", "4x4090+4x3090", "--weights", "fp8"],
        ["skywork-moe", "--gpus", "1xh200", "--weights", "fp8"],
        ["skywork-moe", "--gpus", "16xa800", "--max-num-seqs", "2000"],
        ["llama-3.1-8b", "--gpus", "3xh200"],
        ["smollm2-135m", "--gpus", "2xcpu", "--gpu-split", "1,0"],
    ],
)
def test_the_table_fits_110_columns(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["plan", "serve", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110 and not any("…" in line for line in lines)
    assert any(line.startswith(("fits: ", "does not fit: ")) for line in lines)


def test_the_table_says_what_matters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(FLAGSHIP) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fits: 39,536 KV tokens (2,471 pages of 16), 154 sequences of 256 at once" in text
    assert "even shards, padded to 40 heads 35,120 70,240" in text
    assert "attention efficiency 0.90" in text and "12 GB/s and 42 us" in text
    assert main(["plan", "serve", "skywork-moe", "--gpus", "1xh200", "--weights", "fp8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit: rank 0 needs 146.98 GB for weights and has 141.50 GB it would fit with" in text
    assert "--gpus 2xh200 (141,888 KV tokens)" in text


def test_the_table_says_where_fp8_weights_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    line = "moeforge quantize"
    for arguments, told in (
        (["skywork-moe", "--gpus", "8x4090", "--weights", "fp8"], True),
        (["skywork-moe", "--gpus", "8x4090"], True),  # where they are the advice
        (["olmoe-1b-7b", "--gpus", "1x4090"], False),
    ):
        assert main(["plan", "serve", *arguments]) == 0
        assert (line in " ".join(capsys.readouterr().out.split())) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8x490"], 'gpus = "8x490": "8x490" is unknown; did you mean 8x4090?'),
        (["--gpus", "0x4090"], 'must have at least one GPU in "0x4090"'),
        ([], "Missing option '--gpus'"),
        (["--gpus", "8x4090", "--gpu-split", "1,2,3"], "must have one number for each of the 8 GPUs"),
        (["--gpus", "2x4090", "--gpu-split", "a,b"], 'gpu_split = "a,b": must have one number'),
        (["--gpus", "8x4090", "--max-model-len", "8193"], "max_model_len = 8193: must be at most 8192"),
        (["--gpus", "8x4090", "--max-model-len", "0"], "max_model_len = 0: must be a whole number, at least 1"),
        (["--gpus", "8x4090", "--max-num-seqs", "0"], "max_num_seqs = 0: must be a whole number, at least 1"),
        (["--gpus", "8x4090", "--context", "0"], "--context 0: must be at least 1"),
        (["--gpus", "8x4090", "--context", "8193"], "context = 8193: must be 1 to 8192"),
        (["--gpus", "8x4090", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization = 1.5: must be above 0"),
        (["--gpus", "8x4090", "--gpu-memory-utilization", "nan"], "gpu_memory_utilization = nan: must be above 0"),
        (["--gpus", "8x4090", "--weights", "int4"], "'int4' is not one of 'auto', 'fp8', 'bf16'"),
        (["--gpus", "8x4090", "--kv-cache-dtype", "fp4"], "'fp4' is not one of 'auto', 'fp8'"),
        (["--gpus", "8x4090", "--max-model-len", "many"], "unable to parse string as an integer: 'many'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "serve", "skywork-moe", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_more_ranks_than_columns(model: Callable[..., Path], refused: Callable[..., str]) -> None:
    line = refused(["plan", "serve", str(model()), "--gpus", "33x4090"])
    assert line.startswith("tensor_parallel_size = 33: must be at most 32, the columns of the model's narrowest")


PAGE = (Path(__file__).parents[2] / "docs" / "serving-plans.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```\n\$ moeforge (plan serve .*)\n([^`]*)```", PAGE)


def test_the_page_has_the_four_servers() -> None:
    assert len(SHOWN) >= 4
    for gpus in ("8x4090", "7x4090", "4x4090+4x3090", "1xh200"):
        assert any(f"--gpus {gpus} " in f"{command} " for command, _ in SHOWN)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_what_the_page_shows_is_current(
    command: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(command.split()) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == output.splitlines()


def test_planning_a_preset_needs_no_torch() -> None:
    code = "import sys; from moeforge.cli.app import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *FLAGSHIP], check=True, capture_output=True)
