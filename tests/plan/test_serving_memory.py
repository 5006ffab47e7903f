"""The planner's bytes of weights against the parameters of loaded ranks, FP8 ones with their scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeforge.config.gpus import load_gpus
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.quantization import QuantizationConfig
from moeforge.config.serving import EngineConfig
from moeforge.kernels import fp8_weight
from moeforge.model import Transformer
from moeforge.plan import serving_matrix
from moeforge.plan.serving import ServingPlan, ServingRequest, plan_serving
from moeforge.plan.serving_memory import Dtype
from moeforge.serve.load import dummy_rank

# Wider than a block and no multiple of one, heads of several blocks together; layers 1 and 3 are routed.
MODEL = ModelConfig(
    vocab_size=101, hidden_size=200, num_layers=4, num_heads=10, num_kv_heads=5, head_dim=48, ffn_size=272,
    max_positions=64, qkv_bias=True, output_bias=True, qk_norm="full", moe=MoEConfig(3, 2, 144, layer_frequency=2),
)  # fmt: skip
ODD = replace(MODEL, head_dim=12, ffn_size=150, moe=MoEConfig(3, 2, 70))  # rows with different scales meet anywhere
KEPT = ("layers.0.attention.o", "layers.0.ffn.w13", "layers.1.attention.qkv", "layers.2.ffn.w2", "layers.3.ffn.experts")
KINDS = [
    QuantizationConfig("tensor"),
    QuantizationConfig("tensor", "static"),
    QuantizationConfig("channel", "static"),
    QuantizationConfig("channel", "dynamic"),
    QuantizationConfig("block128", "dynamic"),
]


def planned(model: ModelConfig, split: tuple[float, ...], dtype: Dtype = "fp32") -> ServingPlan:
    engine = EngineConfig(tensor_parallel_size=len(split), gpu_split=split)
    return plan_serving(ServingRequest(model, load_gpus(f"{len(split)}x4090"), engine, dtype))


def held(model: Transformer) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("split", [(1,), (1, 1, 1), (1, 1, 1, 1, 1, 1, 1), (5, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("kept", [(), KEPT], ids=["all", "some kept"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.scales} {kind.activations}")
@pytest.mark.parametrize("shape", [MODEL, ODD], ids=["aligned", "odd"])
def test_fp8_weights_are_what_a_rank_holds(
    shape: ModelConfig, kind: QuantizationConfig, kept: tuple[str, ...], split: tuple[float, ...]
) -> None:
    model = replace(shape, quantization=replace(kind, kept=kept))
    plan = planned(model, split)
    for rank, memory in enumerate(plan.memory):
        assert memory.weight_bytes == held(dummy_rank(model, plan.layout, rank, torch.float32))


def test_kept_matrices_are_as_wide_as_the_rest() -> None:
    model = replace(MODEL, quantization=QuantizationConfig("block128", kept=KEPT))
    plan = planned(model, (2, 1), "bf16")
    for rank, memory in enumerate(plan.memory):
        loaded = dummy_rank(model, plan.layout, rank, torch.bfloat16)
        routers = sum(p.numel() for name, p in loaded.named_parameters() if ".router." in name)
        assert memory.weight_bytes == held(loaded) + 2 * routers  # which inference on CPUs widens to float32


def test_the_planner_counts_in_the_kernels_units() -> None:
    assert (serving_matrix.GROUP_ROWS, serving_matrix.BLOCK) == (fp8_weight.GROUP_ROWS, fp8_weight.BLOCK)
