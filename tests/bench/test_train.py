from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeforge.bench.ceiling import matmul_ceiling
from moeforge.bench.train import TrainBench
from moeforge.checkpoint import open_checkpoint, save_model
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.model import Transformer


@pytest.fixture
def bench(tmp_path: Path) -> TrainBench:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
        max_positions=64, family="mixtral", moe=MoEConfig(num_experts=4, top_k=2, expert_size=48),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    model.reset_parameters(0.1)
    save_model(model, tmp_path / "moe")
    torch.save(torch.randint(64, (2 * 16 * 8,)), tmp_path / "tokens.pt")
    made = open_checkpoint(tmp_path / "moe").config
    return TrainBench(tmp_path / "moe", tmp_path / "tokens.pt", made, 2, 16, runs=1, steps=1, note=lambda _: None)


@pytest.mark.slow
def test_both_sides_compute_the_same_loss(bench: TrainBench) -> None:
    result = bench.run(["ratio_fp32"])
    detail = result["detail_fp32"]
    first = detail["first_loss"]
    assert first["moeforge"] == pytest.approx(first["transformers"], rel=1e-5)
    times = detail["step_seconds"]
    assert result["ratio_fp32"] == pytest.approx(times["transformers"][0] / times["moeforge"][0])
    assert detail["profile"][0]["share"] > 0 and result["peer_implementation"]["fp32"] in ("grouped_mm", "eager")


def test_flops_count_what_a_token_meets(bench: TrainBench) -> None:
    experts = 2 * 2 * 3 * 32 * 48
    attention = 2 * (32 * 64 + 32 * 32)
    router_norms_head = 2 * 4 * 32 + 5 * 32 + 64 * 32
    assert bench.flop_per_token() == 6 * (experts + attention + router_norms_head)


def test_the_ceiling_is_a_rate() -> None:
    assert matmul_ceiling(torch.float32, rows=64, inner=64, columns=64) > 0.01
