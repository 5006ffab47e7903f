"""Bytes that a rank needs to serve its shard: weights, and the KV cache of a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.config.serving import KVDtype
from moeforge.partition import Range
from moeforge.plan.serving_matrix import GROUP_ROWS, SCALE_BYTES, matrix_bytes
from moeforge.plan.serving_shards import ServingShard

Dtype = Literal["bf16", "fp32", "fp64"]

RESERVED_BYTES = 1_000_000_000
"""Of a GPU's memory, for its context, activations, logits and workspaces."""

_GATE = 4


@dataclass(frozen=True)
class Storage:
    """Bytes of an element: `kv`, keys and values; `other`, activations and all weights that are not FP8."""

    other: int
    kv: int


def storage(dtype: Dtype, kv_cache_dtype: KVDtype) -> Storage:
    """Of a model that computes in `dtype`."""
    other = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    return Storage(other, 1 if kv_cache_dtype == "fp8" else other)


def usable_bytes(gpu: HardwareProfile, utilization: float) -> int:
    """What weights and pages may take of a GPU; 0 where nothing is left."""
    return max(0, round(gpu.memory_gbytes * 1e9 * utilization) - RESERVED_BYTES)


def attention_bytes(model: ModelConfig, layer: int, groups: Range, stored: Storage) -> int:
    """A layer's projections, with scales, biases and the norms of queries and keys, on a rank with these KV groups."""
    d, hd, per = model.hidden_size, model.head_dim, model.heads_per_group
    begin, end = groups
    q, kv = (end - begin) * per * hd, (end - begin) * hd
    qkv_fp8, o_fp8 = (model.fp8(f"layers.{layer}.attention.{name}") for name in ("qkv", "o"))
    matrices = matrix_bytes(q + 2 * kv, (0, d), qkv_fp8, stored.other, hd % GROUP_ROWS == 0)
    matrices += matrix_bytes(d, (begin * per * hd, end * per * hd), o_fp8, stored.other)
    norms = {"none": 0, "head": 2 * hd, "full": q + kv}[model.qk_norm]
    biases = (q + 2 * kv if model.qkv_bias else 0) + (d if model.output_bias else 0)
    return matrices + (norms + biases) * stored.other


def expert_bytes(model: ModelConfig, layer: int, columns: Range, stored: Storage) -> int:
    """One expert of a layer, or its dense feed-forward, with scales, on a rank with these of its columns."""
    (begin, end), d = columns, model.hidden_size
    w13, w2 = (model.fp8(name) for name in _feed_forward(model, layer))
    aligned = math.gcd(begin, end) % GROUP_ROWS == 0
    up = matrix_bytes(2 * (end - begin), (0, d), w13, stored.other, aligned)
    return up + matrix_bytes(d, columns, w2, stored.other)


def input_scale_bytes(model: ModelConfig, layer: int) -> int:
    """The scales of a layer's static FP8 activations: one for each of its four matrices, or stacks of them."""
    names = (f"layers.{layer}.attention.qkv", f"layers.{layer}.attention.o", *_feed_forward(model, layer))
    found = [fp8 for name in names if (fp8 := model.fp8(name)) is not None]
    return SCALE_BYTES * sum(fp8.activations == "static" for fp8 in found)


def _feed_forward(model: ModelConfig, layer: int) -> tuple[str, str]:
    """What up- and down-projection are called in `config.quantization`."""
    name = f"layers.{layer}.ffn"
    return (f"{name}.experts",) * 2 if model.is_moe_layer(layer) else (f"{name}.w13", f"{name}.w2")


def gate_bytes(model: ModelConfig, stored: Storage) -> int:
    """One layer's router, whole on every rank, in float32: as inference keeps it but for small ones on GPUs, which
    Triton reads in 16 bits."""
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
        expert = expert_bytes(model, layer, shard.column_ranges[layer], stored)
        total += attention_bytes(model, layer, shard.group_ranges[layer], stored) + 2 * norm
        total += input_scale_bytes(model, layer)
        if model.moe is not None and model.is_moe_layer(layer):
            total += model.moe.num_experts * expert + gate_bytes(model, stored)
        else:
            total += expert
    return total


def replicated_bytes(model: ModelConfig, stored: Storage) -> int:
    """What every rank holds however small its share: norms, routers, and scales of rows."""
    nothing = ((0, 0),) * model.num_layers
    return weight_bytes(model, ServingShard(nothing, nothing, 0), stored)


def kv_token_bytes(model: ModelConfig, shard: ServingShard, stored: Storage) -> int:
    """Keys and values of one position in all layers of a rank."""
    return 2 * model.head_dim * stored.kv * sum(shard.kv_groups)
