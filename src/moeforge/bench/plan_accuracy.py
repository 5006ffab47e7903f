"""What the planner's simulator says of a step, against real steps.

`torchrun --nproc-per-node 2 -m moeforge.bench.plan_accuracy JOB.json`; plans of one process with `--nproc-per-node 1`.
All plans live in the same processes and take steps in turn, with the units timed between them, so the machine's moods
hit plans and units alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError

from moeforge.bench.machine import threads_of
from moeforge.bench.train_worker import TokenStream, batches
from moeforge.bench.unit_times import UnitTimer, mean_time, typical
from moeforge.checkpoint import Checkpoint, open_checkpoint
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.parallel import layout_for
from moeforge.config.presets import PRESETS, model_preset
from moeforge.config.schema import TrainConfig
from moeforge.errors import UserError
from moeforge.heap import keep_freed_memory
from moeforge.layout import Layout, unit_names
from moeforge.model import Transformer
from moeforge.parallel import Group, Mesh, launch
from moeforge.parallel.pipeline import share_tied
from moeforge.plan.memory import unit_kind
from moeforge.plan.problem import PipelineProblem, PlanUnit
from moeforge.plan.simulator import simulate
from moeforge.plan.times import UnitTime
from moeforge.train import Trainer
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.run import load_chunks

DEFAULTS: dict[str, Any] = {"precision": "bf16", "positions": 256, "micro_batches": 8, "pairs": 5}
_STEPS = 4  # of tokens, which are then read again


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a simulation is made from: the times of each kind of unit, and what two stages cost each other (seconds)."""

    kinds: Mapping[str, UnitTime]
    transfer: float = 0.0
    tied_all_reduce: float = 0.0


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Measure and simulate the plans of a job.

    Keys: `model`, a directory or, with random weights, a preset (then with `experts`: so many a layer, top-2);
    `layers`, to use only the first ones; `tokens`, a saved int64 tensor (random ones without it); `precision`,
    `positions`, `micro_batches` of one sequence, `pairs` (steps of each plan that count); `plans`, each with `name`,
    `stages` (layers of each), and if wanted `recompute_layers` and `schedule`. Raises UserError for plans that do not
    fit.
    """
    job = DEFAULTS | job
    processes, device = launch.world_size(), torch.device("cpu")
    keep_freed_memory()
    torch.set_num_threads(threads_of(processes))
    launch.initialise(device, 600)
    source, shape = model_of(job)
    configs = {plan["name"]: plan_config(job, plan, processes) for plan in job["plans"]}
    meshes = {name: Mesh.create(layout_for(each, shape, processes), device) for name, each in configs.items()}
    trainers = {name: plan_trainer(job, config, shape, source, meshes[name]) for name, config in configs.items()}
    world = next(iter(meshes.values())).world
    gauge = Gauge(job, shape, world)

    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for pair in range(job["pairs"] + 1):
        for name, trainer in trainers.items():
            world.barrier()
            begin = time.perf_counter()
            trainer.train_step()
            world.barrier()
            if pair:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begin)
        for _ in range(2):  # of the warm-up's, none counts
            gauge.sample(warm_up=pair == 0)
    figures = gauge.figures()
    simulated = {
        name: simulated_seconds(mesh.layout, shape, figures, job["micro_batches"]) for name, mesh in meshes.items()
    }
    return {
        **job,
        "layers": shape.num_layers,
        "processes": processes,
        "threads": torch.get_num_threads(),
        **dataclasses.asdict(figures),
        **_compare(seconds, simulated),
    }


def simulated_seconds(layout: Layout, shape: ModelConfig, figures: Figures, micro_batches: int) -> float:
    """Seconds of a step of this layout by the simulator."""
    names = unit_names(shape)
    problem = PipelineProblem(
        units=tuple(PlanUnit(figures.kinds[unit_kind(shape, name)]) for name in names),
        cuts=(),
        pp=layout.pp,
        micro_batches=micro_batches,
        schedule=layout.schedule,
        chunks=layout.chunks,
        tied_reduction=figures.tied_all_reduce,
        is_tied=shape.tie_embeddings,
    )
    stages = [
        problem.stage(stage.begin_unit, stage.end_unit, [names.index(name) for name in stage.recompute])
        for stage in layout.stages
    ]
    return simulate(layout.schedule, layout.pp, micro_batches, stages, figures.transfer).step_seconds


class Gauge:
    """Units, transfers and sums of tied gradients, on all processes at once. Keys of `job` as in `main`."""

    def __init__(self, job: dict[str, Any], shape: ModelConfig, world: Group) -> None:
        self.world = world
        self.timer = UnitTimer(shape, job["precision"], 1, job["positions"], meet=world.barrier)
        dtype = MODEL_DTYPE[job["precision"]]
        self.hidden = torch.zeros(job["positions"], shape.hidden_size, dtype=dtype)
        rows = shape.vocab_size if shape.tie_embeddings else 0
        self.embedding = torch.zeros(rows, shape.hidden_size, dtype=torch.promote_types(dtype, torch.float32))
        self.transfers, self.sums = list[float](), list[float]()

    def sample(self, warm_up: bool = False) -> None:
        """Measure all once more; a warm-up is not counted."""
        self.timer.sample(warm_up)
        if self.world.size == 1:
            return
        self.world.barrier()
        transfers = [round_trip(self.world, self.hidden) / 2 for _ in range(5)]
        self.world.barrier()
        begin = time.perf_counter()
        self.world.all_reduce(self.embedding)
        if not warm_up:
            self.transfers += transfers
            self.sums.append(time.perf_counter() - begin)

    def figures(self) -> Figures:
        """Means over the processes."""
        pair = self.world.size > 1
        own = (self.timer.kinds(), typical(self.transfers) if pair else 0.0, typical(self.sums) if pair else 0.0)
        kinds, transfers, sums = zip(*self.world.all_gather_object(own), strict=True)
        means = {kind: mean_time([each[kind] for each in kinds]) for kind in kinds[0]}
        return Figures(means, statistics.fmean(transfers), statistics.fmean(sums))


def round_trip(group: Group, x: torch.Tensor) -> float:
    """Seconds that x takes from one process to the other and back."""
    begin = time.perf_counter()
    for sender in (0, 1):
        if group.index == sender:
            group.send(x, 1 - sender)
        else:
            group.receive(x, sender)
    return time.perf_counter() - begin


def _compare(seconds: dict[str, list[float]], simulated: dict[str, float]) -> dict[str, Any]:
    results, ratios = dict[str, dict[str, Any]](), list[dict[str, Any]]()
    for name, steps in seconds.items():
        measured = statistics.median(steps)
        results[name] = {
            "measured_step_seconds": measured,
            "simulated_step_seconds": simulated[name],
            "error": simulated[name] / measured - 1,
            "measured": steps,
        }
    for a, b in itertools.combinations(seconds, 2):
        measured = statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        ratio = simulated[a] / simulated[b]
        ratios.append({"plans": [a, b], "measured": measured, "simulated": ratio, "error": ratio / measured - 1})
    return {
        "results": results,
        "ratios": ratios,
        "largest_error": max(abs(each["error"]) for each in results.values()),
        "largest_ratio_error": max((abs(each["error"]) for each in ratios), default=0.0),
    }


def model_of(job: dict[str, Any]) -> tuple[Checkpoint | None, ModelConfig]:
    """The checkpoint, None for random weights, and the shape of what is trained."""
    name, layers = job["model"], job.get("layers")
    source = None if name in PRESETS and not Path(name).exists() else open_checkpoint(name)
    shape = model_preset(name) if source is None else source.config
    if experts := job.get("experts"):
        if source is not None:
            raise UserError(f"experts = {experts}: only for a preset; {name} has its own")
        shape = dataclasses.replace(shape, moe=MoEConfig(experts, 2, shape.ffn_size))
    if layers is not None and not 1 <= layers <= shape.num_layers:
        raise UserError(f"layers = {layers}: must be between 1 and the model's {shape.num_layers}")
    shape = dataclasses.replace(shape, num_layers=layers or shape.num_layers)
    if source is not None:
        source.config = shape  # of its weights, those of the first layers are read
    return source, shape


def plan_config(job: dict[str, Any], plan: dict[str, Any], processes: int) -> TrainConfig:
    """The training file of a plan, with keys as in `main`."""
    stages = plan["stages"]
    parallel = {
        "pp": processes,
        "chunks": max(1, len(stages) // processes),
        "stages": stages,
        "recompute_layers": plan.get("recompute_layers", []),
        "schedule": plan.get("schedule", "1f1b"),
    }
    data = {
        "run": {"similarity_every": 0, "gate_distribution_every": 0},
        "model": {"path": job["model"], "precision": job["precision"]},
        "data": {"train": [{"path": job.get("tokens", "random")}], "sequence_length": job["positions"]},
        "train": {"steps": 1000, "batch_sequences": job["micro_batches"], "micro_batch_sequences": 1},
        "optimizer": {"lr": 1e-6},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "parallel": parallel,
    }
    try:
        return TrainConfig.model_validate(data, strict=False)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"plan {plan['name']}: {where} = {problem['input']!r}: {problem['msg']}") from error


def plan_trainer(
    job: dict[str, Any], config: TrainConfig, shape: ModelConfig, source: Checkpoint | None, mesh: Mesh
) -> Trainer:
    """A trainer without a run directory."""
    dtype, positions, sequences = MODEL_DTYPE[job["precision"]], job["positions"], job["micro_batches"]
    torch.manual_seed(0)
    if "tokens" in job:
        data = batches(Path(job["tokens"]), sequences, positions, _STEPS)
    else:
        data = [torch.randint(0, shape.vocab_size, (sequences, positions)) for _ in range(_STEPS)]
    if source is not None:
        chunks = load_chunks(source, mesh, dtype)
    else:
        chunks = [Transformer(shape, mesh.layout, stage).to(dtype) for stage in mesh.stages]
        for chunk in chunks:
            chunk.reset_parameters()
        share_tied(chunks)
    return Trainer(config, Path("."), mesh, chunks, source or cast(Checkpoint, _Shape(shape)), TokenStream(data), None)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a trainer asks of the checkpoint that it starts from, as long as nothing is saved."""

    config: ModelConfig


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    if launch.world_rank() == 0:
        print(json.dumps(result))
    launch.shut_down()
