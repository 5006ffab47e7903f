"""One side of the training benchmark in a process of its own: full optimiser steps, timed one by one.

`python -m moeforge.bench.train_worker JSON` prints one JSON object. A process per run keeps allocators, thread
pools and caches of the two sides apart.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

StepFunction = Callable[[Tensor], float]


def batches(path: Path, sequences: int, positions: int, count: int) -> list[Tensor]:
    """`count` token batches [B, S] from a saved stream of tokens, the same for every side."""
    stream = torch.load(path, weights_only=True)
    need = sequences * positions
    return [stream[i * need : (i + 1) * need].view(sequences, positions) for i in range(count)]


def ours(model_path: str, precision: str, lr: float) -> StepFunction:
    """moeforge's step: router statistics and balance loss included, as `moeforge train` does it."""
    from moeforge.checkpoint import load_model
    from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups
    from moeforge.train.balance import AdaptiveCoefficients, drop_rate
    from moeforge.train.heap import keep_freed_memory
    from moeforge.train.optimizer import MODEL_DTYPE, Optimizer

    keep_freed_memory()
    model = load_model(model_path, MODEL_DTYPE[precision])
    config = model.config
    assert config.moe is not None
    optimizer = Optimizer(model, masters=precision == "bf16", weight_decay=0.01)
    balance = AdaptiveCoefficients(len(config.moe_layers), 0.01, 0.2, 0.99, adaptive=True)
    num_experts = config.moe.num_experts

    def step(tokens_BS: Tensor) -> float:
        b, s = tokens_BS.shape
        targets_BS = torch.cat([tokens_BS[:, 1:], torch.full((b, 1), -100)], dim=1)
        record = RouterRecord(config.moe_layers, num_experts, 1, balance.alpha, b * s)
        context = ForwardContext(DenseAttention(b, s), groups=RoutingGroups(b), record=record)
        hidden = model(tokens_BS.flatten(), torch.arange(s).repeat(b), context)
        loss = model.loss(hidden, targets_BS.flatten(), context) / (b * (s - 1))
        loss.backward()
        optimizer.step(lr)
        balance.update(drop_rate(record.totals(), "group", 1.25))
        return loss.item()

    return step


def transformers(model_path: str, precision: str, lr: float, experts: str) -> StepFunction:
    """transformers' Mixtral with one of its expert implementations and fused AdamW."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, experts_implementation=experts)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step(tokens_BS: Tensor) -> float:
        loss = model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def profile(step: StepFunction, tokens_BS: Tensor, rows: int = 12) -> list[dict[str, Any]]:
    """Where a step's time goes: the operators with the most time of their own."""
    with torch.profiler.profile() as recorded:
        step(tokens_BS)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"op": event.key, "share": event.self_cpu_time_total / total, "calls": event.count} for event in events[:rows]
    ]


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Warm up, time `steps` steps, and report losses and seconds."""
    data = batches(Path(job["tokens"]), job["sequences"], job["positions"], job["warmup"] + job["steps"])
    if job["side"] == "moeforge":
        step = ours(job["model"], job["precision"], job["lr"])
    else:
        step = transformers(job["model"], job["precision"], job["lr"], job["experts"])
    losses, seconds = [], []
    for tokens_BS in data:
        start = time.perf_counter()
        losses.append(step(tokens_BS))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result: dict[str, Any] = {"losses": losses, "step_seconds": seconds[job["warmup"] :], "peak_rss_bytes": peak}
    if job.get("profile"):
        result["profile"] = profile(step, data[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
