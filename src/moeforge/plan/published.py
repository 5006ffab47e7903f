"""Published training steps, predicted from their settings alone. Nothing here was fitted to them.

Predictions are for this project's runtime on the presets of `config.clusters`: gradients are reduced after the last
backward, nothing is overlapped, no CUDA graphs; most of the published runs overlap both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeforge.config.clusters import load_hardware
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.layout import build_layout
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.planner import evaluate
from moeforge.plan.search import work_of
from moeforge.plan.workload import Workload


@dataclass(frozen=True)
class Point:
    """A published run: bf16, ZeRO-1, sequences of 4,096 unless said. `tokens_per_second` is of one GPU; `memory` the
    largest allocation in 10^9 bytes, where published. `stages`: layers of each, None for even ones; `recompute`: units
    recomputed as a whole where the run recomputed parts of them."""

    name: str
    source: str
    model: ModelConfig
    cluster: str
    arrangement: Arrangement
    batch_sequences: int
    tokens_per_second: float
    sequence_length: int = 4096
    memory: float | None = None
    stages: tuple[float, ...] | None = None
    recompute: str = "none"


def _mixtral(**changes: Any) -> ModelConfig:
    return replace(model_preset("mixtral-8x7b"), **changes)


_8X22B = _mixtral(num_layers=56, hidden_size=6144, num_heads=48, moe=MoEConfig(8, 2, 16384))
_8X7B_256K = _mixtral(vocab_size=256_000)
_QWEN3_30B = model_preset("qwen3-30b-a3b")
_QWEN3_235B = replace(_QWEN3_30B, num_layers=94, hidden_size=4096, num_heads=64, moe=MoEConfig(128, 8, 1536))
_GPT_OSS = ModelConfig(
    vocab_size=201_088, hidden_size=2880, num_layers=36, num_heads=64, num_kv_heads=8, head_dim=64, ffn_size=2880,
    moe=MoEConfig(128, 4, 2880),
)  # fmt: skip
_GOLDEN = "Megatron-LM d98e8a64, functional_tests golden values; number of GPUs inferred from allocated memory"
_INTERLEAVED = "interleaved-1f1b"

POINTS = (
    Point(
        "Skywork-MoE", "arXiv 2406.06563, appendix B; batch not published, 12.6 M tokens assumed",
        model_preset("skywork-moe"), "192x8-a800", Arrangement(12, 32, 4, 4, 1, "1f1b", 1, 1), 1536, 690.0, 8192,
    ),
    Point(
        "Mixtral 8x7B, 256K vocabulary", f"{_GOLDEN} (A100)", _8X7B_256K, "16x8-a800",
        Arrangement(4, 16, 2, 4, 2, "1f1b", 1, 1), 1024, 1474.0, memory=25.4,
    ),
    Point(
        "Mixtral 8x7B, 256K vocabulary", _GOLDEN, _8X7B_256K, "16x8-h100",
        Arrangement(4, 16, 2, 4, 2, "1f1b", 1, 1), 1024, 3657.0, memory=25.4,
    ),
    Point(
        "Mixtral 8x7B", _GOLDEN, _mixtral(), "8x8-h100",
        Arrangement(4, 8, 2, 8, 1, _INTERLEAVED, 8, 1), 256, 4960.0, memory=35.5,
    ),
    Point(
        "Mixtral 8x22B", _GOLDEN, _8X22B, "16x8-h100",
        Arrangement(8, 8, 2, 8, 2, "1f1b", 1, 1), 256, 1185.0, memory=28.5,
    ),
    Point(
        "Mixtral 8x22B, tuned", "Megatron-MoE-ModelZoo e8650517, natural routing", _8X22B, "16x8-h100",
        Arrangement(8, 8, 2, 8, 1, _INTERLEAVED, 7, 1), 256, 1837.0,
    ),
    Point(
        "Qwen3-235B, DeepEP", "Megatron-MoE-ModelZoo e8650517", _QWEN3_235B, "32x8-h100",
        Arrangement(8, 8, 4, 8, 1, _INTERLEAVED, 4, 1), 2048, 1130.0, stages=(2, *(3,) * 30, 2),
    ),
    Point(
        "Qwen3-235B, EP 32, DeepEP", "Megatron-MoE-ModelZoo e8650517; recomputes norms and SwiGLU", _QWEN3_235B,
        "32x8-h100", Arrangement(8, 16, 2, 32, 1, _INTERLEAVED, 4, 1), 2048, 1663.0, stages=(2, *(3,) * 30, 2),
    ),
    Point(
        "Qwen3-30B, overlapped exchange", "Megatron-Bridge 067f987d, moe-hardware-configs", _QWEN3_30B, "2x8-h100",
        Arrangement(1, 16, 1, 16, 1, "1f1b", 1, 1), 1024, 13011.0,
    ),
    Point(
        "GPT-OSS-120B", "Megatron-Bridge 067f987d, performance summary 26.02; windows counted as full attention",
        _GPT_OSS, "8x8-h100", Arrangement(4, 16, 1, 8, 1, "1f1b", 1, 1), 1280, 5993.0,
    ),
)  # fmt: skip


def predicted(points: Sequence[Point] = POINTS) -> list[dict[str, Any]]:
    """For each point the prediction, the published figure, and the error (predicted / published - 1)."""
    return [_row(point) for point in points]


def _row(point: Point) -> dict[str, Any]:
    hardware, a = load_hardware(point.cluster), point.arrangement
    whole = Workload(point.model, "bf16", point.sequence_length, a.micro_batch_sequences, point.batch_sequences)
    work = work_of(whole, a)
    layout = build_layout(
        point.model, pp=a.pp, dp=a.dp, tp=a.tp, ep=a.ep, etp=a.etp, schedule=a.schedule, chunks=a.chunks,
        stages=point.stages, recompute=point.recompute,
    )  # fmt: skip
    plan = evaluate(hardware, work, a, layout)
    memory = max(plan.peaks) / 1e9
    return {
        "name": point.name,
        "source": point.source,
        "cluster": point.cluster,
        "arrangement": a.describe(),
        "published_tokens_per_second_per_gpu": point.tokens_per_second,
        "predicted_tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "error": plan.tokens_per_second_per_gpu / point.tokens_per_second - 1,
        "published_memory_gbytes": point.memory,
        "predicted_memory_gbytes": memory,
        "memory_error": None if point.memory is None else memory / point.memory - 1,
        "predicted_update_share": plan.simulation.update_seconds / plan.step_seconds,
    }
