from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.bench import serve
from moeforge.bench.serve import ServeBench, agreement, best_ratio, paired_ratio
from moeforge.bench.serve_peers import check_peers, python_sides
from moeforge.bench.serve_side import Workload
from moeforge.checkpoint import save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import RunError, UserError
from moeforge.model import Transformer


def test_ratios_pair_the_rounds() -> None:
    assert paired_ratio([10, 30, 20], [10, 10, 40]) == 1.0  # of 1, 3 and 0.5
    peers = {"slow": [5.0, 5.0, 5.0], "fast": [8.0, 10.0, 100.0]}
    assert best_ratio([20.0, 20.0, 20.0], peers) == (2.0, "fast")
    assert agreement([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75


def test_rates_count_new_tokens_or_the_prompt_of_a_prefill() -> None:
    assert Workload("8", 8, 64, 64).rate(2.0) == 256
    assert Workload("prefill_512", 1, 512, 1).rate(2.0) == 256


def test_prompts_are_distinct_and_the_same_for_all_sides() -> None:
    workload = Workload("8", 8, 64, 64)
    prompts = workload.prompts(100, 1)
    assert prompts == workload.prompts(100, 1) != workload.prompts(100, 2)
    assert [len(prompt) for prompt in prompts] == [64] * 8 and len(set(map(tuple, prompts))) == 8
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)


class FakeSide:
    """Takes the given seconds for every request, by mode, however many there are."""

    def __init__(self, name: str, seconds: dict[str, float], log: list[str]) -> None:
        self.name, self.about, self._seconds, self._log = name, {"version": "1"}, seconds, log

    def modes(self, workload: Workload) -> list[str]:
        return list(self._seconds)

    def run(self, workload: Workload, prompts: list[list[int]], mode: str) -> dict[str, Any]:
        self._log.append(f"{self.name} {mode} {workload.name}")
        return {"seconds": self._seconds[mode], "foreign_share": 0.0, "first_tokens": [p[0] for p in prompts]}

    def close(self) -> None:
        self._log.append(f"{self.name} closed")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeBench:
    monkeypatch.setattr(serve, "machine", lambda: {"threads": 1})
    return ServeBench(
        tmp_path, 64, ["hf", "vllm"], None, tmp_path, (1, 2), 4, 4, 8, runs=2, note=lambda _: None
    )  # fmt: skip


def test_the_fastest_side_and_mode_of_each_engine_runs_in_turn(
    bench: ServeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    made = {
        "moeforge": [FakeSide("ours", {"default": 1.0}, log)],
        "hf": [FakeSide("hf", {"eager": 3.0, "grouped": 2.0}, log)],
        "vllm": [FakeSide("slow", {"eager": 9.0}, log), FakeSide("fast", {"compiled": 4.0}, log)],
    }
    monkeypatch.setattr(bench, "_sides", lambda name: [lambda side=side: side for side in made[name]])
    result = bench.run()
    assert result["ratio_at"] == {"1": 2.0, "2": 2.0} and result["ratio_prefill_8"] == 2.0
    assert result["best_peer"] == {"1": "hf", "2": "hf", "prefill_8": "hf"}
    assert result["peers"]["vllm"]["ratio_at"]["2"] == 4.0
    assert result["moeforge"]["runs_tokens_per_second"]["2"] == [8.0, 8.0]
    assert result["peers"]["hf"]["settings"]["1"] == {"version": "1", "chosen": "grouped"}
    assert result["peers"]["hf"]["trials_tokens_per_second"]["1"] == {"eager": [4 / 3] * 2, "grouped": [2.0] * 2}
    assert result["peers"]["hf"]["first_token_agreement"]["2"] == 1.0
    assert log.index("slow closed") < log.index("ours default 1", 3)  # before the runs that count
    rounds = log[log.index("slow closed") + 1 :]
    assert rounds[:4] == ["ours default 1", "hf grouped 1", "fast compiled 1", "ours default 2"]
    assert len([line for line in rounds if "slow" in line]) == 0 and rounds.count("hf grouped prefill_8") == 2
    assert sorted(rounds[-3:]) == ["fast closed", "hf closed", "ours closed"]


def test_a_mode_is_judged_by_the_better_of_two_trials(bench: ServeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first trial is cold; a mode that is hopeless in it gets no second one."""

    class Cold(FakeSide):
        def run(self, workload: Workload, prompts: list[list[int]], mode: str) -> dict[str, Any]:
            cold = f"{self.name} {mode} {workload.name}" not in self._log
            run = super().run(workload, prompts, mode)
            return run | {"seconds": run["seconds"] * (1.5 if cold else 1.0)}

    log: list[str] = []
    made: dict[str, list[FakeSide]] = {
        "moeforge": [FakeSide("ours", {"default": 1.0}, log)],
        "hf": [Cold("hf", {"good": 2.5, "best": 2.0, "hopeless": 2.9}, log)],
        "vllm": [FakeSide("vllm", {"eager": 4.0}, log)],
    }
    monkeypatch.setattr(bench, "_sides", lambda name: [lambda side=side: side for side in made[name]])
    hf = bench.run()["peers"]["hf"]
    assert hf["settings"]["1"]["chosen"] == "best"  # though its first trial was slower than the second of `good`
    assert hf["trials_tokens_per_second"]["1"] == {
        "good": [4 / 3.75, 4 / 2.5], "best": [4 / 3, 2.0], "hopeless": [pytest.approx(4 / 4.35)],
    }  # fmt: skip
    assert log.count("hf hopeless 1") == 1


def test_a_side_that_fails_closes_the_others(bench: ServeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def fails() -> FakeSide:
        raise RunError("bench serve: the process of hf failed: no memory")

    ours = FakeSide("ours", {"default": 1.0}, log)
    monkeypatch.setattr(bench, "_sides", lambda name: [lambda: ours] if name == "moeforge" else [fails])
    with pytest.raises(RunError, match="hf failed: no memory"):
        bench.run()
    assert log[-1] == "ours closed"


def test_missing_peers(tmp_path: Path) -> None:
    check_peers(["hf"], None)
    with pytest.raises(UserError, match="--against sglang: must be one of hf, vllm, llama.cpp"):
        check_peers(["sglang"], None)
    with pytest.raises(UserError, match="--peers-dir: missing; vllm needs"):
        check_peers(["hf", "vllm"], None)
    (tmp_path / "vllm").mkdir()
    with pytest.raises(UserError, match="vllm is not set up there; run benchmarks/peers.sh"):
        check_peers(["vllm"], tmp_path)
    (tmp_path / "vllm" / ".done").touch()
    check_peers(["vllm"], tmp_path)


def test_terms_are_the_same_for_ours_and_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm" / "lib").mkdir(parents=True)
    (tmp_path / "vllm" / "lib" / "libiomp5.so").touch()
    ours = python_sides("moeforge", tmp_path, tmp_path, 32, 513)[0]["job"]["engine"]
    assert not ours["enable_prefix_caching"] and ours["max_num_seqs"] == 32
    vllm = python_sides("vllm", tmp_path, tmp_path, 32, 513)
    assert all(spec["job"]["engine"].items() >= ours.items() for spec in vllm)
    assert [(spec["job"]["engine"]["enforce_eager"], "LD_PRELOAD" in spec["environment"]) for spec in vllm] == [
        (True, False), (True, True), (False, False), (False, True),
    ]  # fmt: skip


def test_ours_and_transformers_run_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
        max_positions=64, family="mixtral", moe=MoEConfig(num_experts=4, top_k=2, expert_size=48),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.reset_parameters(0.1)
    save_model(model, tmp_path / "moe")
    monkeypatch.setattr(serve, "machine", lambda: {"threads": 1})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench = ServeBench(
        tmp_path / "moe", 64, ["hf"], None, tmp_path, (1, 3), 5, 4, 16, runs=1, note=lambda _: None
    )  # fmt: skip
    result = bench.run()
    assert set(result["ratio_at"]) == {"1", "3"} and result["ratio_at"]["3"] > 0
    assert result["peers"]["hf"]["first_token_agreement"]["3"] >= 2 / 3  # transformers computes in bf16
    assert result["moeforge"]["settings"]["1"]["threads"] == 1
