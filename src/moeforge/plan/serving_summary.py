"""A serving plan as figures for JSON and tables."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from moeforge.config.gpus import shared_link
from moeforge.plan.serving import ServingPlan, most_blocks, pooled_blocks, rank_memory, shares
from moeforge.plan.serving_advice import remedies
from moeforge.plan.serving_shards import ServingShard, padded_shards, unrotated_shards


def figures(plan: ServingPlan) -> dict[str, Any]:
    """JSON-ready. Times of ranks are those of `step_batch` sequences with `context_tokens` each."""
    request, batch = plan.request, max(1, plan.most_sequences)
    link, step = shared_link(request.gpus), plan.step(batch)
    return {
        "weights": request.weights,
        "dtype": request.dtype,
        "kv_cache_dtype": request.engine.kv_cache_dtype,
        "max_model_len": request.max_model_len,
        "max_num_seqs": request.engine.max_num_seqs,
        "gpu_memory_utilization": request.engine.gpu_memory_utilization,
        "block_size_tokens": request.engine.block_size,
        "weight_bytes": sum(rank.weight_bytes for rank in plan.memory),
        "kv_tokens": plan.kv_tokens,
        "num_blocks": plan.num_blocks,
        "fits": plan.fits,
        "would_fit": [] if plan.fits else [remedy._asdict() for remedy in remedies(request)],
        "attention_efficiency": plan.attention_efficiency,
        "bus_gbytes_per_second": link.gbytes_per_second,
        "all_reduce_latency_us": link.latency_us,
        "context_tokens": request.live_tokens,
        "most_sequences": plan.most_sequences,
        "step_batch": batch,
        "ranks": [_rank(plan, rank, step.busy[rank], step.compute) for rank in range(len(plan.shards))],
        "curve": [_point(plan, batch) for batch in plan.batches],
        "comparison": comparison(plan),
        "warnings": warnings(plan),
        "layout": json.loads(plan.layout.to_json()),
    }


def _rank(plan: ServingPlan, rank: int, busy: float, compute: float) -> dict[str, Any]:
    gpu, shard, memory = plan.request.gpus[rank], plan.shards[rank], plan.memory[rank]
    per = plan.request.model.heads_per_group
    blocks = memory.num_blocks
    return {
        "rank": rank,
        "gpu": gpu.name,
        "heads_by_layer": [groups * per for groups in shard.kv_groups],
        "kv_heads_by_layer": list(shard.kv_groups),
        "ffn_columns_by_layer": list(shard.columns),
        "vocab_rows": shard.vocab_rows,
        "usable_bytes": memory.usable_bytes,
        "weight_bytes": memory.weight_bytes,
        "kv_bytes_per_token": memory.kv_token_bytes,
        # None: holds no keys and values, so any number
        "kv_tokens": None if blocks is None else blocks * plan.request.engine.block_size,
        "step_ms": busy * 1e3,
        "wait_ms": max(0.0, compute - busy) * 1e3,
    }


def _point(plan: ServingPlan, batch: int) -> dict[str, Any]:
    step = plan.step(batch)
    parts = {"compute": step.compute, "all_reduce": step.all_reduce, "logits_gather": step.gather}
    return {
        "batch": batch,
        "step_ms": step.total * 1e3,
        "tokens_per_second": batch / step.total,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in parts.items()},
    }


def comparison(plan: ServingPlan) -> list[dict[str, Any]]:
    """KV tokens of this layout, of others on the same GPUs, and the bound; as the cache is, and in fp8."""
    model, tp = plan.request.model, len(plan.shards)
    heads = -(-model.num_kv_heads // tp) * tp * model.heads_per_group
    layouts: dict[str, tuple[ServingShard, ...]] = {
        "this plan": plan.shards,
        "the same split in every layer": unrotated_shards(model, tp, shares(plan.request)),
        f"even shards, padded to {heads} heads": padded_shards(model, tp),
    }
    rows = [{"layout": name, **_both(plan, shards)} for name, shards in layouts.items()]
    bound = _both(plan, plan.shards, pooled=True)
    return [*rows, {"layout": "bound: all memory pooled", **bound}]


def _both(plan: ServingPlan, shards: tuple[ServingShard, ...], pooled: bool = False) -> dict[str, int]:
    fp8 = dataclasses.replace(plan.request, engine=dataclasses.replace(plan.request.engine, kv_cache_dtype="fp8"))
    size, found = plan.request.engine.block_size, {}
    for key, request in (("kv_tokens", plan.request), ("kv_tokens_fp8", fp8)):
        memory = rank_memory(request, shards)
        found[key] = size * (pooled_blocks(memory, size) if pooled else most_blocks(memory))
    return found


def warnings(plan: ServingPlan) -> list[str]:
    """What a reader should know before relying on the plan."""
    found, request = [], plan.request
    if plan.attention_efficiency < 1:
        most = max(max(shard.kv_groups) for shard in plan.shards)
        groups = f"{most} KV group{'' if most == 1 else 's'}"
        mean = request.model.num_kv_heads / len(plan.shards)
        found.append(
            f"attention efficiency {plan.attention_efficiency:.2f}: ranks hold up to {groups} of a layer, "
            f"{mean:.2f} on average, and the others wait for those; rotation evens memory, not time"
        )
    over = [rank for rank, memory in enumerate(plan.memory) if memory.free_bytes < 0]
    if over:
        worst = max(over, key=lambda rank: -plan.memory[rank].free_bytes)
        memory = plan.memory[worst]
        found.append(
            f"does not fit: rank {worst} needs {memory.weight_bytes / 1e9:.2f} GB for weights and has "
            f"{memory.usable_bytes / 1e9:.2f} GB"
        )
    elif not plan.fits:
        found.append(
            f"does not fit: the KV cache has room for {plan.kv_tokens:,} tokens, one sequence may have "
            f"{request.max_model_len:,}"
        )
    return found
