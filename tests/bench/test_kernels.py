"""The kernel benchmark on a CPU: what it counts, and that all of it runs."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.bench import kernels_tune
from moeforge.bench.kernels import KernelBench, _expert_sides, _one_by_one, _sides, models
from moeforge.bench.kernels_limits import Limits
from moeforge.bench.kernels_timing import copy_bandwidth, dense_ceiling, in_turn, ratio, that_run
from moeforge.cli.app import main
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.kernels import expert_mlp_reference, native

TINY = ModelConfig(
    vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=48,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=48),
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for one another make such small work take seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sides_take_turns_and_warm_up_once() -> None:
    order: list[str] = []
    found = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"
    assert {side: len(seconds) for side, seconds in found.items()} == {"a": 3, "b": 3}
    assert ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == 2.0  # of 2, 3 and 1
    assert ratio(found, "a", "c") is None


def test_a_peer_that_cannot_run_is_left_out_and_ours_is_not() -> None:
    def refuse() -> None:
        raise RuntimeError("not on this device")

    able, failed = that_run({"ours": lambda: None, "peer": refuse, "other": lambda: None}, "ours")
    assert list(able) == ["ours", "other"] and failed == {"peer": "RuntimeError: not on this device"}
    with pytest.raises(RuntimeError):
        that_run({"ours": refuse}, "ours")


def test_rates_are_positive() -> None:
    assert copy_bandwidth(CPU, 2**12, rounds=2) > 0 and dense_ceiling(CPU, (16, 32), rounds=2) > 0


def test_the_limit_is_the_larger_of_the_two_times() -> None:
    limits = Limits(read_bytes=4000, inner=64)
    flops = 2.0 * 1024 * 64 * 64
    found = {"read": [1.0, 2.0, 8.0], "matmul": [1.0, 1.0, 1.0], "ours": [1.0, 1.0, 2.0]}
    # By round, of twice the bytes: 2, 4 and 8 times the buffer's reading time, over ours.
    assert limits.of(found, "ours", 2 * 4000, flops) == {"limit": "memory", "fraction_of_limit": 4.0}
    assert limits.of(found, "ours", 400, 3 * flops) == {"limit": "matmul", "fraction_of_limit": 3.0}
    # Limited by matmuls in two rounds of three.
    assert limits.of(found, "ours", 1000, flops) == {"limit": "matmul", "fraction_of_limit": 1.0}


def test_limits_are_measured_in_turn_with_the_kernels() -> None:
    limits = Limits(read_bytes=2**12, inner=32)
    found = limits.in_turn({"ours": lambda: None}, 2)
    assert limits.read == [2**12 / seconds for seconds in found["read"]] and len(limits.matmul) == 2


def test_all_sides_compute_the_same() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        outputs = {side: call(x) for side, call in _sides(weight).items()}
    for side, y in outputs.items():
        exact = x.double() @ weight.double().t()
        error = float((y.double() - exact).norm() / exact.norm())
        assert error < (0.05 if side == "fp8" else 0.005), side


def test_the_peers_loop_over_experts_is_the_reference() -> None:
    torch.manual_seed(0)
    sides = _expert_sides(TINY)
    x, chosen = torch.randn(6, 64, dtype=torch.bfloat16), torch.rand(6, 4).topk(2)
    arguments = x, chosen.values.softmax(-1), chosen.indices
    with torch.inference_mode():
        outputs = {side: call(*arguments) for side, call in sides.items()}
    for side, y in outputs.items():
        error = float((y.double() - outputs["torch"].double()).norm() / outputs["torch"].double().norm())
        assert error < (0.08 if side == "fp8" else 0.01), side

    w13, w2 = torch.randn(2, 16, 8, dtype=torch.float64), torch.randn(2, 8, 8, dtype=torch.float64)
    y = _one_by_one(
        [_map(w) for w in w13], [_map(w) for w in w2], torch.ones(1, 8, dtype=torch.float64),
        torch.tensor([[0.25, 0.75]], dtype=torch.float64), torch.tensor([[1, 0]]),
    )  # fmt: skip
    both = expert_mlp_reference(torch.ones(2, 8, dtype=torch.float64), w13, w2, torch.tensor([1, 2]))
    torch.testing.assert_close(y[0], 0.25 * both[1] + 0.75 * both[0])


def _map(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ weight.t()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GB/s and 300 GFLOP/s, without measuring them."""

    def of(self: Limits, found: Any, side: str, read_bytes: float, flops: float) -> dict[str, Any]:
        assert {"read", "matmul", side} <= found.keys()
        self.read, self.matmul = [10e9], [300e9]
        fractions = {"memory": read_bytes / 10e9, "matmul": flops / 300e9}
        limit = max(fractions, key=lambda name: fractions[name])
        return {"limit": limit, "fraction_of_limit": fractions[limit] / statistics.median(found[side])}

    monkeypatch.setattr(Limits, "of", of)


def test_every_case_is_measured(measured: None) -> None:
    notes: list[str] = []
    bench = KernelBench(rows=(1, 3), rounds=1, working_bytes=2**12)
    result = bench.run({"tiny": TINY}, notes.append)
    assert notes == ["tiny"] and result["native"] == native.name()
    assert result["limits"] == {"read_gbytes_per_second": 10.0, "bf16_gflops": 300.0}
    assert [(case["kernel"], case["rows"]) for case in result["matmuls"]] == [
        (kernel, rows) for kernel in ("qkv", "o", "head", "experts") for rows in (1, 3)
    ]
    for case in result["matmuls"]:
        for side in ("bf16", "fp8"):
            assert case[side]["microseconds"] > 0 and case[side]["limit"] == "memory"
        least = case["bf16"]["fraction_of_limit"] * case["bf16"]["microseconds"]
        each = 3 * 64 * 48
        weights = {"qkv": 128 * 64, "o": 64 * 64, "head": 96 * 64, "experts": 2 * each if case["rows"] == 1 else None}
        if (read := weights[case["kernel"]]) is not None:
            assert least == pytest.approx(2 * read / 10e9 * 1e6)
        else:
            assert 2 * 2 * each / 10e9 * 1e6 <= least * 1.000001 <= 4.0001 * 2 * each / 10e9 * 1e6
        assert case["fp8"]["speedup_over"]["bf16"] > 0 and case["bf16"]["speedup_over"]["torch"] > 0
    assert [(case["kernel"], case["rows"]) for case in result["others"]] == [
        (kernel, rows) for rows in (1, 3) for kernel in ("attention", "routing", "norm")
    ]
    assert all(case["microseconds"] > 0 and case["speedup_over"]["torch"] > 0 for case in result["others"])


def test_models_are_two_mixtures() -> None:
    assert [config.moe is not None for config in models().values()] == [True, True]


def test_verb_prints_a_table_and_writes_the_same_as_json(
    measured: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("moeforge.bench.kernels.models", lambda: {"tiny": TINY})
    monkeypatch.setattr("moeforge.heap.keep_freed_memory", lambda: None)
    small = partial(KernelBench, rounds=1, working_bytes=2**12)
    monkeypatch.setattr("moeforge.bench.kernels.KernelBench", small)
    assert main(["bench", "kernels", "--rows", "2", "--out", str(tmp_path / "kernels.json")]) == 0
    shown = capsys.readouterr().out
    assert "10.0 GB/s read" in shown and all(word in shown for word in ("experts", "attention", "onednn"))
    assert main(["bench", "kernels", "--rows", "2", "--json"]) == 0
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written.keys() == json.loads(capsys.readouterr().out).keys()
    assert {case["rows"] for case in written["matmuls"]} == {2}


def test_a_gpus_cases_are_shown_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("moeforge.bench.gpu.facts", lambda device: {"device": str(device)})
    monkeypatch.setattr(
        "moeforge.bench.gpu.kernel_cases", lambda device, rows: iter([("copy", lambda: {"rate": {"read": rows}})])
    )
    assert main(["bench", "kernels", "--rows", "1,4", "--out", str(tmp_path / "gpu.json")]) == 0
    assert "rate, read" in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "cuda:0" and written["cases"][0]["rate"] == {"read": [1, 4]}


def test_bad_rows_and_tuning_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--rows", "0"]) == 2
    assert capsys.readouterr().err == (
        "moeforge: error: --rows 0: must be whole numbers from 1 on, with commas between them\n"
    )
    assert main(["bench", "kernels", "--tune"]) == 2
    assert capsys.readouterr().err == "moeforge: error: --tune: needs a GPU, and torch sees none; leave it out\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels_tune, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tune: needs the package triton"):
        kernels_tune.check_tunable()


def test_what_was_tuned_is_where_the_kernels_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs = pytest.importorskip("moeforge.kernels.triton.configs")
    table = {"16-bit": {16: {"block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 2, "group_m": 8}}}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr("moeforge.kernels.triton.tuning.tune", lambda device: table)
    path = kernels_tune.tune_here()
    assert path == configs.table_path("A GPU") and os.listdir(path.parent) == [path.name]
    found = configs._table.__wrapped__("A GPU")
    assert found == {"16-bit": {16: configs.Config(16, 64, 4, 2)}}
