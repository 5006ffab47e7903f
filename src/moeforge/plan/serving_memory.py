"""Bytes that a rank needs to serve its shard: weights, and the KV cache of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.config.serving import KVDtype
from moeforge.plan.serving_shards import ServingShard

Dtype = Literal["bf16", "fp32", "fp64"]
WeightFormat = Literal["fp8", Dtype]

RESERVED_BYTES = 1_000_000_000
"""Of a GPU's memory, for its context, activations, logits and workspaces."""

_SCALE, _GATE = 4, 4


@dataclass(frozen=True)
class Storage:
    """Bytes of an element: `matrix`, those of attention and feed-forward; `other`, the rest (embedding, head, norms,
    biases, activations); `kv`, keys and values. `scale`: bytes that every matrix has besides."""

    matrix: int
    other: int
    kv: int
    scale: int


def storage(dtype: Dtype, kv_cache_dtype: KVDtype, fp8: bool) -> Storage:
    """Of a model that computes in `dtype` and holds its weights in it; `fp8`: matrices as Skywork-MoE's released ones,
    e4m3 with one float32 scale each."""
    other = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    kv = 1 if kv_cache_dtype == "fp8" else other
    return Storage(1, other, kv, _SCALE) if fp8 else Storage(other, other, kv, 0)


def usable_bytes(gpu: HardwareProfile, utilization: float) -> int:
    """What weights and pages may take of a GPU; 0 where nothing is left."""
    return max(0, round(gpu.memory_gbytes * 1e9 * utilization) - RESERVED_BYTES)


def attention_bytes(model: ModelConfig, groups: int, stored: Storage) -> int:
    """One layer's projections, with biases and the norms of queries and keys, on a rank with so many KV groups."""
    d, hd, per = model.hidden_size, model.head_dim, model.heads_per_group
    q, kv = groups * per * hd, groups * hd
    matrices = 2 * d * (q + kv) * stored.matrix + (4 * stored.scale if groups else 0)
    norms = {"none": 0, "head": 2 * hd, "full": q + kv}[model.qk_norm]
    biases = (q + 2 * kv if model.qkv_bias else 0) + (d if model.output_bias else 0)
    return matrices + (norms + biases) * stored.other


def expert_bytes(model: ModelConfig, columns: int, stored: Storage) -> int:
    """One expert, or one dense feed-forward, on a rank with so many of its columns."""
    return 3 * (model.hidden_size * columns * stored.matrix + (stored.scale if columns else 0))


def gate_bytes(model: ModelConfig, stored: Storage) -> int:
    """One layer's router, whole on every rank; inference keeps it in float32."""
    if model.moe is None:
        return 0
    moe, each = model.moe, max(_GATE, stored.other)
    return each * (moe.num_experts * (model.hidden_size + moe.router_bias) + moe.gate_norm_learned)


def weight_bytes(model: ModelConfig, shard: ServingShard, stored: Storage) -> int:
    """All weights of a rank. Embedding and head share one matrix where they are tied."""
    norm = model.hidden_size * stored.other
    matrices = 1 if model.tie_embeddings else 2
    total = shard.vocab_rows * model.hidden_size * stored.other * matrices + norm
    for layer in range(model.num_layers):
        expert = expert_bytes(model, shard.columns[layer], stored)
        total += attention_bytes(model, shard.kv_groups[layer], stored) + 2 * norm
        if model.moe is not None and model.is_moe_layer(layer):
            total += model.moe.num_experts * expert + gate_bytes(model, stored)
        else:
            total += expert
    return total


def replicated_bytes(model: ModelConfig, stored: Storage) -> int:
    """What every rank holds however small its share: norms and routers."""
    nothing = (0,) * model.num_layers
    return weight_bytes(model, ServingShard(nothing, nothing, 0), stored)


def kv_token_bytes(model: ModelConfig, shard: ServingShard, stored: Storage) -> int:
    """Keys and values of one position in all layers of a rank."""
    return 2 * model.head_dim * stored.kv * sum(shard.kv_groups)
