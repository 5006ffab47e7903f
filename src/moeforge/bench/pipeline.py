"""Planned against uniform pipeline stages: `torchrun --nproc-per-node 2 -m moeforge.bench.pipeline JOB.json`.

Both splits live in the same two processes and take steps in turn, so the machine's moods hit both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeforge.bench.train_worker import TokenStream, batches
from moeforge.bench.unit_times import unit_times
from moeforge.checkpoint import open_checkpoint
from moeforge.config.model import ModelConfig
from moeforge.config.parallel import layout_for
from moeforge.config.schema import TrainConfig
from moeforge.parallel import Mesh, launch
from moeforge.plan.pipeline import UnitTime, best_boundaries, one_f_one_b, stage_times
from moeforge.train import Trainer
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.run import load_chunks


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Keys of `job`: model and tokens (files), precision, positions, micro_batches, pairs. Returns medians and all
    times."""
    torch.set_num_threads(1)
    launch.initialise(torch.device("cpu"), 600)
    source = open_checkpoint(job["model"])
    dtype = MODEL_DTYPE[job["precision"]]
    world = Mesh.create(layout_for(pipeline_config(job, []), source.config, 2), torch.device("cpu")).world
    own = unit_times(source.config, dtype, 1, job["positions"], meet=world.barrier)
    everyone = world.all_gather_object(own)
    units = [_mean(each) for each in zip(*everyone, strict=True)]

    count, m = source.config.num_layers, job["micro_batches"]
    first = count - count // 2
    cuts = {"uniform": 1 + 2 * first, "planned": best_boundaries(units, 2, m)[0]}
    stages = {name: stage_times(units, (cut,)) for name, cut in cuts.items()}
    predicted = {name: one_f_one_b(times, m) for name, times in stages.items()}
    configs = {name: pipeline_config(job, _layers(cut, count)) for name, cut in cuts.items()}
    trainers = {name: pipeline_trainer(job, config, source.config) for name, config in configs.items()}
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
        "stage_seconds": {
            name: [{"forward": s.forward, "backward": s.backward, "update": s.update} for s in times]
            for name, times in stages.items()
        },
        "predicted_step_seconds": predicted,
        "measured_step_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "measured": seconds,
        "ratios": ratios,
        "predicted_gain": expected,
        "measured_gain": gain,
        "share_of_prediction": gain / expected if expected else None,
    }


def _mean(times: tuple[UnitTime, ...]) -> UnitTime:
    n = len(times)
    return UnitTime(*(sum(getattr(each, key) for each in times) / n for key in ("forward", "backward", "update")))


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
