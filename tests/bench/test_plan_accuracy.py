"""Simulated against real steps: what is reported, and that a small model comes out roughly right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeforge.bench import plan_accuracy
from moeforge.bench.plan_accuracy import Figures, simulated_seconds
from moeforge.checkpoint import save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.layout import build_layout
from moeforge.model import Transformer
from moeforge.plan.times import UnitTime

RunRanks = Callable[..., list[Any]]
SHAPE = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=512,
    max_positions=256, family="mixtral", tie_embeddings=True,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=512),
)  # fmt: skip
PLANS = [
    {"name": "even", "stages": [2, 2]},
    {"name": "uneven", "stages": [2.5, 1.5]},
    {"name": "recomputed", "stages": [2, 2], "recompute_layers": [2, 0]},
    {"name": "zero bubble", "stages": [2, 2], "schedule": "zero-bubble"},
]


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    model.reset_parameters()
    save_model(model, tmp_path / "moe")
    torch.save(torch.randint(SHAPE.vocab_size, (4 * 4 * 64,)), tmp_path / "tokens.pt")
    return {
        "model": str(tmp_path / "moe"), "tokens": str(tmp_path / "tokens.pt"), "precision": "fp32", "positions": 64,
        "micro_batches": 4, "pairs": 2, "plans": PLANS,
    }  # fmt: skip


def _bench(rank: int, job: dict[str, Any]) -> dict[str, Any]:
    plan_accuracy.threads_of = lambda _: 1
    return plan_accuracy.main(job)


def test_report(run_ranks: RunRanks, job: dict[str, Any]) -> None:
    result, other = run_ranks(2, _bench, job)
    assert set(result["kinds"]) == {"embed", "attention", "experts", "head"}
    assert result["kinds"] == other["kinds"] and result["transfer"] > 0 and result["tied_all_reduce"] > 0
    assert result["processes"] == 2 and result["threads"] == 1 and result["layers"] == 4
    assert list(result["results"]) == [plan["name"] for plan in PLANS]
    for plan in result["results"].values():
        assert len(plan["measured"]) == 2 and plan["measured_step_seconds"] > 0
        assert plan["error"] == pytest.approx(plan["simulated_step_seconds"] / plan["measured_step_seconds"] - 1)
    assert len(result["ratios"]) == 6
    assert result["ratios"][0]["plans"] == ["even", "uneven"]
    assert result["largest_error"] == max(abs(plan["error"]) for plan in result["results"].values())
    assert result["largest_ratio_error"] == max(abs(ratio["error"]) for ratio in result["ratios"])


@pytest.mark.slow
def test_roughly_right(run_ranks: RunRanks, job: dict[str, Any]) -> None:
    result = run_ranks(2, _bench, job | {"pairs": 5, "positions": 128, "micro_batches": 2})[0]
    for plan in result["results"].values():
        assert 0.5 < plan["simulated_step_seconds"] / plan["measured_step_seconds"] < 2


def test_one_process_and_random_weights(run_ranks: RunRanks, job: dict[str, Any]) -> None:
    plans = [{"name": "all", "stages": [2], "recompute_layers": [2]}, {"name": "none", "stages": [2]}]
    (result,) = run_ranks(1, _bench, job | {"plans": plans, "layers": 2, "pairs": 1})
    assert result["layers"] == 2 and result["transfer"] == result["tied_all_reduce"] == 0
    small = {"model": "smollm2-135m", "experts": 3, "layers": 1, "positions": 8, "micro_batches": 1, "pairs": 1}
    (result,) = run_ranks(1, _bench, small | {"plans": [{"name": "one", "stages": [1]}]})
    assert set(result["kinds"]) == {"embed", "attention", "experts", "head"} and result["ratios"] == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"layers": 5}, "layers = 5: must be between 1 and the model's 4"),
        ({"experts": 4}, "experts = 4: only for a preset"),
        ({"plans": [{"name": "a", "stages": [3]}]}, r"parallel.stages = \[3\]: must sum to the model's 4 layers"),
        ({"plans": [{"name": "a", "stages": [4], "schedule": "best"}]}, "plan a: parallel.schedule = 'best'"),
    ],
)
def test_bad_jobs(change: dict[str, Any], line: str, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_accuracy, "keep_freed_memory", lambda: None)  # the choice of a whole process
    monkeypatch.setattr(plan_accuracy, "threads_of", lambda _: torch.get_num_threads())
    with pytest.raises(UserError, match=line):
        plan_accuracy.main(job | change)


KINDS = {
    "embed": UnitTime(1, 2, 0, 2, 0, 10),
    "attention": UnitTime(10, 20, 11, 12, 9, 100),
    "experts": UnitTime(100, 200, 110, 120, 90, 1000),
    "head": UnitTime(1000, 2000, 1100, 1200, 0, 1),
}
LAYER = 110 + 220


def test_one_process_adds_up() -> None:
    figures = Figures(KINDS, transfer=7, tied_all_reduce=5)
    layout = build_layout(SHAPE, recompute=["layers.0.attention", "layers.3.ffn"])
    micro_batch = 3 + 4 * LAYER + 3000 + 9 + 90
    assert simulated_seconds(layout, SHAPE, figures, 3) == 3 * micro_batch + 10 + 4 * 1100 + 1


def test_two_processes_with_a_tied_embedding() -> None:
    layout = build_layout(SHAPE, pp=2, stages=[3, 1])
    first, last = 3 + 3 * LAYER, LAYER + 3000
    # The last stage is the slower one: the first forward, all of its passes, the first stage's last backward.
    # Three transfers are waited for: two forwards' to it, and the last backward's from it.
    pipeline = 1 + 330 + 2 * last + 2 + 3 * 220 + 3 * 7
    assert first < last
    update = max(10 + 3300 + 5, 1 + 1100 + 5 + 10)
    assert simulated_seconds(layout, SHAPE, Figures(KINDS, 7, 5), 2) == pipeline + update


def test_the_first_stage_leaves_its_split_backward_for_later() -> None:
    layout = build_layout(SHAPE, pp=2, stages=[4, 0], schedule="zero-bubble")
    there, back = 1 + 4 * 110, 2 + 4 * 220
    # One micro-batch: forward, the head's forward and input gradient, then all of the first stage's backward.
    pipeline = there + 1000 + 1100 + back
    update = max(10 + 4400, 1 + 10)
    assert simulated_seconds(layout, SHAPE, Figures(KINDS), 1) == max(pipeline, there + 3300) + update
