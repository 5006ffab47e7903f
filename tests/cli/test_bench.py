"""The verb around the benchmark; tests/bench measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moeforge.bench.serve import ServeBench
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


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--against sglang", "--against sglang: must be one of hf, vllm, llama.cpp"),
        ("", "--peers-dir: missing; vllm needs the folder that benchmarks/peers.sh has filled"),
        ("--peers-dir nowhere", "--peers-dir nowhere: vllm is not set up there; run benchmarks/peers.sh nowhere"),
        ("--against hf --concurrency 1,x", "--concurrency 1,x: must be whole numbers from 1 on"),
        ("--against hf --concurrency 0", "--concurrency 0: must be whole numbers from 1 on"),
        ("--against hf --runs 0", "--runs"),
        ("--rate 0", "--rate 0.0: must be above 0"),
        ("--rate nan", "--rate nan: must be above 0"),
        ("--rate 1 --http", "--rate 1.0: must be above 0, and without --http"),
        ("--rate 1 --against hf", "--against, --peers-dir: are not for loads over HTTP"),
        ("--http --api-key-file key", "--api-key-file: belongs to --url"),
    ],
)
def test_options_of_serving(options: str, line: str, refused: Refused, model: Callable[..., Path]) -> None:
    assert line in refused(["bench", "serve", "--model", str(model()), *options.split()])


def test_serving_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Callable[..., Path], tmp_path: Path
) -> None:
    made = {"ratio_at": {"1": 2.5}, "best_peer": {"1": "hf"}, "peers": {"hf": {}}}
    asked: list[ServeBench] = []
    monkeypatch.setattr("moeforge.bench.serve.ServeBench.run", lambda bench: asked.append(bench) or made)
    arguments = [
        "bench",
        "serve",
        "--model",
        str(model()),
        "--experts",
        "4",
        "--against",
        "hf",
        "--concurrency",
        "1,3,1",
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "1 at once: 2.50 x hf\n"
    bench = asked[0]
    assert (list(bench.concurrency), list(bench.against), bench.vocab_size) == ([1, 3], ["hf"], 64)
    assert main([*arguments, "--json", "--out", str(tmp_path / "serve.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "serve.json").read_text()) == made


def test_latencies_of_a_server_of_our_own(capsys: pytest.CaptureFixture[str], model: Callable[..., Path]) -> None:
    common = ["bench", "serve", "--model", str(model()), "--experts", "4", "--input-len", "8", "--output-len", "6"]
    assert main([*common, "--http", "--concurrency", "3", "--requests", "6", "--json"]) == 0
    load = json.loads(capsys.readouterr().out)["loads"][0]
    assert (load["concurrency"], load["requests"], load["errors"], load["output_tokens"]) == (3, 6, 0, 36)
    assert 0 < load["ttft_ms"]["p50"] <= load["end_to_end_ms"]["p50"] and load["inter_token_ms"]["p99"] > 0
