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

from moeforge.data import Batch

StepFunction = Callable[[Tensor], float]


def batches(path: Path, sequences: int, positions: int, count: int) -> list[Tensor]:
    """`count` token batches [B, S] from a saved stream of tokens, the same for every side."""
    stream = torch.load(path, weights_only=True)
    need = sequences * positions
    return [stream[i * need : (i + 1) * need].view(sequences, positions) for i in range(count)]


class TokenStream:
    """One endless document as training data, cut into the same batches that the other side gets."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._rows = torch.cat(batches)

    def batch(self, position: int, count: int) -> Batch:
        """Rows position..position+count-1, from the start again after the last; the last target of a row is left out,
        as transformers leaves it out."""
        index = torch.arange(position, position + count) % len(self._rows)
        tokens = self._rows[index]
        targets = torch.cat([tokens[:, 1:], torch.full((count, 1), -100)], dim=1)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return Batch(tokens, targets, positions, torch.zeros(tokens.shape, dtype=torch.int32))

    def identity(self) -> str:
        """Nothing is resumed here."""
        return ""


def ours(job: dict[str, Any], data: list[Tensor]) -> StepFunction:
    """`moeforge train`'s own step, with its defaults: router statistics, balance loss, gradient norm, clipping."""
    from moeforge.heap import keep_freed_memory

    keep_freed_memory()
    from moeforge.checkpoint import open_checkpoint
    from moeforge.config.schema import TrainConfig
    from moeforge.layout import Layout
    from moeforge.parallel import Mesh
    from moeforge.train import Trainer
    from moeforge.train.optimizer import MODEL_DTYPE
    from moeforge.train.run import load_chunks

    source = open_checkpoint(job["model"])
    config = TrainConfig.model_validate(
        {
            "run": {"similarity_every": 0, "gate_distribution_every": 0},
            "model": {"path": job["model"], "precision": job["precision"]},
            "data": {"train": [{"path": job["tokens"]}], "sequence_length": job["positions"]},
            "train": {"steps": 1000, "batch_sequences": job["sequences"], "micro_batch_sequences": job["sequences"]},
            "optimizer": {"lr": job["lr"]},
            "schedule": {"kind": "constant", "warmup_steps": 0},
        },
        strict=False,
    )
    mesh = Mesh.single(Layout.single(source.config), torch.device("cpu"))
    chunks = load_chunks(source, mesh, MODEL_DTYPE[job["precision"]])
    trainer = Trainer(config, Path("."), mesh, chunks, source, TokenStream(data), None)
    return lambda _: float(trainer.train_step()["loss"])


def transformers(job: dict[str, Any]) -> StepFunction:
    """transformers' Mixtral with one of its expert implementations and fused AdamW."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, experts_implementation=job["experts"])
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], fused=True)

    def step(tokens_BS: Tensor) -> float:
        loss = model(input_ids=tokens_BS, labels=tokens_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

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
    step = ours(job, data) if job["side"] == "moeforge" else transformers(job)
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
