"""Pipelines whose stages sleep their modelled times, against the simulator: `python -m moeforge.bench.sleeping`.

Sleeping needs no processor, so 12 processes fit on two cores. The executor is that of training, with its schedules,
sends and receives; only what a stage computes is replaced. What torch does between two actions takes a fixed time,
below a millisecond, which is not modelled; so the sleeps are not short.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeforge.config.model import ModelConfig
from moeforge.layout import build_layout
from moeforge.model import ForwardContext, Transformer
from moeforge.model.attention_context import DenseAttention
from moeforge.model.recompute import recomputed
from moeforge.parallel import Mesh
from moeforge.parallel.executor import MicroBatch
from moeforge.parallel.pipeline import Pipeline
from moeforge.parallel.watchdog import Watchdog
from moeforge.plan.simulator import simulate
from moeforge.plan.times import UnitTime, stage_time

_SCHEDULES = (
    ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 3), ("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2),
)  # fmt: skip
"""With the stages of a process."""
_HIDDEN, _TOKENS = 16, 4
_SPIN_SECONDS = 1e-4  # time.sleep oversleeps by up to this
_TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Case:
    """A pipeline of `processes`, and of each stage the times of its one unit and whether that is recomputed."""

    name: str
    schedule: str
    processes: int
    chunks: int
    micro_batches: int
    units: tuple[tuple[UnitTime, bool], ...]

    @property
    def stages(self) -> list[UnitTime]:
        """What the planner makes of them."""
        return [stage_time([unit], first=stage == 0) for stage, unit in enumerate(self.units)]


def cases(processes: int, seed: int = 0) -> list[Case]:
    """Every schedule with uneven stages; zero-bubble with uniform ones too, 1f1b and zbv with some that recompute."""
    chance = random.Random(1000 * seed + processes)
    made = []
    for schedule, chunks in _SCHEDULES:
        rounds = schedule in ("interleaved-1f1b", "zero-bubble")  # these want whole rounds
        micro_batches = 2 * processes if rounds else 2 * processes + 1
        count = processes * chunks
        uneven = [drawn_unit(chance, *((0.016, 0.03) if chunks == 1 else (0.018, 0.024))) for _ in range(count)]
        kinds = {"uneven": [(unit, False) for unit in uneven]}
        if (schedule, chunks) == ("zero-bubble", 1):
            # Longer: equal stages wake up at the same moments, and then wait for one another's processor.
            kinds["uniform"] = [(_unit(0.04, 0.04, 0.04), False)] * count
        if schedule in ("1f1b", "zbv"):
            kinds["recomputed"] = [(unit, stage % 3 == 0) for stage, unit in enumerate(uneven)]
        for name, units in kinds.items():
            made.append(Case(name, schedule, processes, chunks, micro_batches, tuple(units)))
    return made


def drawn_unit(chance: random.Random, least: float, most: float) -> UnitTime:
    """Forward between `least` and `most` seconds; backward twice that, 37 to 63 % of it for the input."""
    forward = chance.uniform(least, most)
    share = chance.uniform(0.75, 1.25)
    return _unit(forward, share * forward, (2 - share) * forward)


def _unit(forward: float, for_input: float, for_weight: float) -> UnitTime:
    return UnitTime(forward, for_input + for_weight, for_input, for_weight, recompute=forward)


class Sleeper(Watchdog):
    """Sleeps until so long after the beginning of an action, which the executor tells its watchdog: what torch computes
    inside of an action is part of its time, as it is where a stage is measured. What comes between actions is not."""

    def __init__(self) -> None:
        super().__init__()
        self._due = 0.0

    @contextmanager
    def doing(self, operation: str) -> Iterator[None]:
        """Something begins."""
        self._due = time.perf_counter()
        with super().doing(operation):
            yield

    def sleep(self, seconds: float) -> None:
        """Until the former sleeps of this action and this one are over."""
        self._due += seconds
        sleep_until(self._due)


def sleep_until(due: float) -> None:
    """By `time.perf_counter`."""
    time.sleep(max(0.0, due - time.perf_counter() - _SPIN_SECONDS))
    while time.perf_counter() < due:
        pass


class _Sleep(torch.autograd.Function):
    """Identity that sleeps in each direction. In a split backward torch asks for it in the pass that needs its
    gradient: for that of the input if x is the input, for that of the weights if x is a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sleeper: Sleeper, there: float, back: float) -> Tensor:
        ctx.sleeper, ctx.back = sleeper, back
        out = x.clone()
        if there:
            sleeper.sleep(there)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.sleeper.sleep(ctx.back)
        return grads[0], None, None, None


class SleepingUnit(nn.Module):
    """x plus a weight; two operations, so that gradients of the input and of the weight each sleep their own time."""

    def __init__(self, seconds: UnitTime, sleeper: Sleeper) -> None:
        super().__init__()
        self.seconds, self.sleeper = seconds, sleeper
        self.weight = nn.Parameter(torch.zeros(_HIDDEN))

    def forward(self, x_tD: Tensor) -> Tensor:
        """[t, D]"""
        through: Tensor = _Sleep.apply(x_tD, self.sleeper, self.seconds.forward, self.seconds.backward_input)
        weight: Tensor = _Sleep.apply(self.weight, self.sleeper, 0.0, self.seconds.backward_weight)
        return through + weight


class SleepingChunk(nn.Module):
    """What `Pipeline` asks of a stage's Transformer; with an embedding on the first and a loss on the last."""

    def __init__(self, config: ModelConfig, stage: int, case: Case, sleeper: Sleeper) -> None:
        super().__init__()
        (unit, recompute), count = case.units[stage], len(case.units)
        self.config, name = config, f"layers.{stage}.attention"
        self.names = (*(["embed"] * (stage == 0)), name, *(["head"] * (stage == count - 1)))
        self.recompute = frozenset([name] if recompute else [])
        self.unit = SleepingUnit(unit, sleeper)
        # The first stage's input needs no gradient, but what follows its embedding does.
        self.embed = nn.Parameter(torch.zeros(_HIDDEN)) if stage == 0 else None
        self.head = nn.Linear(_HIDDEN, 1, bias=False) if stage == count - 1 else None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, context: ForwardContext, hidden: Tensor | None) -> Tensor:
        """[t, D] as in `Transformer.forward`."""
        x = hidden if self.embed is None else self.embed.expand(len(tokens_T), _HIDDEN)
        assert x is not None
        out: Tensor = recomputed(self.unit, x) if self.recompute else self.unit(x)
        return out.clone() if out._is_view() else out

    def loss(self, hidden_tD: Tensor, targets_T: Tensor, context: ForwardContext) -> Tensor:
        """One number."""
        assert self.head is not None
        return cast(Tensor, self.head(hidden_tD).sum())


class Run:
    """A case in the processes of an initialised group; all of them do the same."""

    def __init__(self, case: Case) -> None:
        self.case, count = case, len(case.units)
        config = ModelConfig(
            vocab_size=16, hidden_size=_HIDDEN, num_layers=count, num_heads=1, num_kv_heads=1, head_dim=16, ffn_size=16
        )  # fmt: skip
        layout = build_layout(config, pp=case.processes, schedule=case.schedule, chunks=case.chunks)
        sleeper = Sleeper()
        self.mesh = Mesh.create(layout, torch.device("cpu"), watchdog=sleeper)
        chunks = [SleepingChunk(config, stage, case, sleeper) for stage in self.mesh.stages]
        self.pipeline = Pipeline(cast(Sequence[Transformer], chunks), self.mesh, torch.float32, lambda: None)
        tokens = torch.zeros(_TOKENS, dtype=torch.int64)
        batch = MicroBatch(tokens, tokens, tokens, ForwardContext(DenseAttention(1, _TOKENS)), 1.0)
        self.batches = [batch] * case.micro_batches

    def step_seconds(self) -> float:
        """From a moment that all have agreed on, which no barrier's own time blurs, to the end of the last one."""
        begin = max(self.mesh.world.all_gather_object(time.perf_counter())) + 0.02
        sleep_until(begin)
        self.pipeline.train(self.batches)
        ends: list[float] = self.mesh.world.all_gather_object(time.perf_counter())
        return max(ends) - begin

    def transfer_seconds(self) -> float:
        """Of a tensor as small as a hidden state here, to a neighbour that waits for it, while others send as well; the
        median of 20, each after a pause as between actions, since processors need a while to wake up."""
        x, pp, trips = torch.zeros(_TOKENS * _HIDDEN, dtype=torch.float64), self.mesh.pp, list[float]()
        for _ in range(20):
            if pp.index % 2:
                pp.receive(x, pp.index - 1)
                trips.append(time.perf_counter() - float(x[0]))  # one clock for all of a machine
            else:
                sleep_until(time.perf_counter() + 0.01)
                x[0] = time.perf_counter()
                pp.send(x, pp.index + 1)
        return statistics.median(trip for each in pp.all_gather_object(trips) for trip in each)


def measure(wanted: Sequence[Case], steps: int = 3) -> list[dict[str, Any]]:
    """In each process of a group: every case after a warm-up, its median step beside the simulator's."""
    results = []
    for case in wanted:
        run = Run(case)
        run.step_seconds()
        measured = [run.step_seconds() for _ in range(steps)]
        transfer = run.transfer_seconds()
        simulated = simulate(case.schedule, case.processes, case.micro_batches, case.stages, transfer).step_seconds
        shape = {key: value for key, value in vars(case).items() if key != "units"}
        figures = {
            "transfer_seconds": transfer,
            "measured_seconds": statistics.median(measured),
            "simulated_seconds": simulated,
            "error": simulated / statistics.median(measured) - 1,
            "measured": measured,
        }
        results.append(shape | figures)
    return results


def forked(processes: int, wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """`measure` in so many processes, forked so that each need not import torch. Raises RuntimeError if one fails."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [fork.Process(target=_rank, args=(r, processes, Path(directory), wanted)) for r in range(processes)]
        for each in ranks:
            each.start()
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while any(each.is_alive() for each in ranks) and time.monotonic() < deadline:
            if any(each.exitcode for each in ranks):
                break
            time.sleep(0.2)
        failed = [rank for rank, each in enumerate(ranks) if each.exitcode != 0]
        for each in ranks:
            each.kill()
            each.join()
        if failed:
            raise RuntimeError(f"{processes} processes: ranks {failed} failed or were late")
        return cast(list[dict[str, Any]], json.loads((Path(directory) / "results").read_text()))


def _rank(rank: int, processes: int, directory: Path, wanted: Sequence[Case]) -> None:
    torch.set_num_threads(1)  # first: a forked child hangs in the parent's OpenMP threads
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    store = dist.FileStore(str(directory / "store"), processes)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timeout)
    results = measure(wanted)
    if rank == 0:
        (directory / "results").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # a group's threads may abort an interpreter that ends


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the cases of each number of processes, and of them the schedules named, or all."""
    parser = argparse.ArgumentParser(prog="python -m moeforge.bench.sleeping", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 8, 12], metavar="N")
    parser.add_argument("--schedules", nargs="+", metavar="NAME")
    given = parser.parse_args(arguments)
    begin, found = time.perf_counter(), list[dict[str, Any]]()
    for count in given.processes:
        wanted = [case for case in cases(count) if not given.schedules or case.schedule in given.schedules]
        found += forked(count, wanted)
    return {
        "cases": found,
        "largest_error": max((abs(case["error"]) for case in found), default=0.0),
        "seconds": time.perf_counter() - begin,
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
