"""Planned against uniform pipeline stages: `torchrun --nproc-per-node 2 -m moeforge.bench.pipeline JOB.json`.

Both splits live in the same two processes and take steps in turn, so the machine's moods hit both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeforge.bench.plan_accuracy import Gauge, simulated_seconds
from moeforge.bench.train_worker import TokenStream, batches
from moeforge.checkpoint import open_checkpoint
from moeforge.config.model import ModelConfig
from moeforge.config.parallel import layout_for
from moeforge.config.schema import TrainConfig
from moeforge.layout import build_layout
from moeforge.parallel import Mesh, launch
from moeforge.train import Trainer
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.run import load_chunks

_WARM_UPS, _REPEATS = 2, 7


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Keys of `job`: model and tokens (files), precision, positions, micro_batches, pairs. Returns medians and all
    times."""
    torch.set_num_threads(1)
    launch.initialise(torch.device("cpu"), 600)
    shape = open_checkpoint(job["model"]).config
    world = Mesh.create(build_layout(shape, pp=2), torch.device("cpu")).world
    gauge = Gauge(job, shape, world)
    for repeat in range(_WARM_UPS + _REPEATS):
        gauge.sample(warm_up=repeat < _WARM_UPS)
    figures = gauge.figures()

    count, m = shape.num_layers, job["micro_batches"]
    first = count - count // 2

    def predict(cut: int) -> float:
        return simulated_seconds(build_layout(shape, pp=2, stages=_layers(cut, count)), shape, figures, m)

    cuts = {"uniform": 1 + 2 * first, "planned": min(range(1, 2 * count + 2), key=predict)}
    predicted = {name: predict(cut) for name, cut in cuts.items()}
    configs = {name: pipeline_config(job, _layers(cut, count)) for name, cut in cuts.items()}
    trainers = {name: pipeline_trainer(job, config, shape) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cuts}
    for pair in range(job["pairs"] + 1):
        for name, trainer in trainers.items():
            world.barrier()
            begin = time.perf_counter()
            trainer.train_step()
            world.barrier()
            if pair:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
    ratios = [u / p for u, p in zip(seconds["uniform"], seconds["planned"], strict=True)]
    gain, expected = statistics.median(ratios) - 1, predicted["uniform"] / predicted["planned"] - 1
    return {
        "layers": count,
        "micro_batches": m,
        "positions": job["positions"],
        "precision": job["precision"],
        "stages_layers": {name: _layers(cut, count) for name, cut in cuts.items()},
        "megatron_rule_layers": [first, count - first],  # embedding and loss as one layer each
        **dataclasses.asdict(figures),
        "predicted_step_seconds": predicted,
        "measured_step_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "measured": seconds,
        "ratios": ratios,
        "predicted_gain": expected,
        "measured_gain": gain,
        "share_of_prediction": gain / expected if expected else None,
    }


def _layers(cut: int, count: int) -> list[float]:
    """The layers of two stages whose boundary lies before unit `cut`."""
    return [(cut - 1) / 2, count - (cut - 1) / 2]


def pipeline_config(job: dict[str, Any], stages: Sequence[float], recompute: Sequence[int] = ()) -> TrainConfig:
    """Two stages of so many layers, a step of `micro_batches` sequences, one a micro-batch."""
    return TrainConfig.model_validate(
        {
            "run": {"similarity_every": 0, "gate_distribution_every": 0},
            "model": {"path": job["model"], "precision": job["precision"]},
            "data": {"train": [{"path": job["tokens"]}], "sequence_length": job["positions"]},
            "train": {"steps": 1000, "batch_sequences": job["micro_batches"], "micro_batch_sequences": 1},
            "optimizer": {"lr": 1e-6},
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "parallel": {"pp": 2, "stages": stages, "recompute_layers": recompute},
        },
        strict=False,
    )


def pipeline_trainer(job: dict[str, Any], config: TrainConfig, shape: ModelConfig) -> Trainer:
    """A trainer of this configuration on two processes, without a run directory."""
    source = open_checkpoint(job["model"])
    mesh = Mesh.create(layout_for(config, shape, 2), torch.device("cpu"))
    chunks = load_chunks(source, mesh, MODEL_DTYPE[job["precision"]])
    data = TokenStream(batches(Path(job["tokens"]), job["micro_batches"], job["positions"], 4))
    return Trainer(config, Path("."), mesh, chunks, source, data, None)


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    if launch.world_rank() == 0:
        print(json.dumps(result))
    launch.shut_down()
