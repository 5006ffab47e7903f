"""What one of the processes of `moeforge bench calibrate` measures; all measure the same at the same time.

`torchrun ... -m moeforge.bench.machine JOB.json`; the first one prints what was found, as means over the processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeforge.bench.clock import Clock
from moeforge.bench.unit_times import UnitTimer, mean_time
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.heap import keep_freed_memory
from moeforge.parallel import launch
from moeforge.plan.times import UnitTime

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_TINY = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_size=32,
    moe=MoEConfig(num_experts=4, top_k=2, expert_size=32),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    matmul_seconds: float = 0.5
    """The largest matmul takes about so long."""
    copy_bytes: int = 2**28
    message_bytes: int = 2**25
    repeats: int = 7


def threads_of(processes: int) -> int:
    """The share of the cores that each of so many processes gets."""
    return max(1, (os.cpu_count() or 1) // processes)


class _Worker:
    """One of the processes that measure at the same time."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.sizes = job, Sizes(**job["sizes"])
        self.processes = launch.world_size()
        self.device = launch.local_device(torch.device(job["device"]))
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(threads_of(self.processes))
        launch.initialise(self.device, 600)
        self.clock = Clock(self.device)

    def meet(self) -> None:
        if self.processes > 1:
            dist.barrier()

    def everyone(self, value: Any) -> list[Any]:
        if self.processes == 1:
            return [value]
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, value)
        return found

    def median(self, work: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call: the median over repetitions of `calls` calls."""
        seconds = []
        for _ in range(self.sizes.repeats + 1):
            begin = self.clock.mark()
            for _ in range(calls):
                work()
            end = self.clock.mark()
            self.clock.wait()
            seconds.append(self.clock.seconds(begin, end) / calls)
        return statistics.median(seconds[1:])

    def rates(self) -> dict[str, Any]:
        """Means over the processes."""
        gpu = self.device.type == "cuda"
        names = [name for name in _DTYPES if not gpu or name != "fp64"]
        matmul = {}
        for name in names:
            everyone = self.everyone(list(self.matmuls(_DTYPES[name])))
            matmul[name] = [
                {"flops": flops, "tflops": statistics.fmean(rates[i][1] for rates in everyone)}
                for i, (flops, _) in enumerate(everyone[0])
            ]
        x = torch.ones(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        self.meet()
        bandwidth = 2 * x.numel() / self.median(lambda: y.copy_(x)) / 1e9
        return {
            "matmul": matmul,
            "memory_gbytes_per_second": statistics.fmean(self.everyone(bandwidth)),
            "memory_bytes": self.memory_bytes(),
            "unit_overhead_us": statistics.fmean(self.everyone(self.overhead())) * 1e6,
        }

    def matmuls(self, dtype: torch.dtype) -> Iterator[tuple[float, float]]:
        """FLOPs (2 n^3) and TFLOP/s of square matmuls of growing size, on weights in turn, so that they come from
        memory."""
        seconds = 1e-5
        for n in (side for power in range(6, 15) for side in (2**power, 3 * 2 ** (power - 1))):  # 64, 96, 128, 192, ...
            flops = 2.0 * n**3
            x = torch.randn(n, n, device=self.device).to(dtype)
            count = self.sizes.copy_bytes // 4 // (x.numel() * x.element_size())
            weights = itertools.cycle([x.clone() for _ in range(min(512, max(2, count)))])
            self.meet()
            seconds = self.median(functools.partial(_multiply, x, weights), math.ceil(0.02 / seconds))
            yield flops, flops / seconds / 1e12
            if max(self.everyone(seconds)) * 3.4 > self.sizes.matmul_seconds:  # what the next size takes, at most
                return

    def memory_bytes(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.processes

    def overhead(self) -> float:
        """Seconds of a pass of a layer's unit that has next to nothing to compute."""
        times = self.timer(_TINY, "fp32", 1, 8).kinds()
        layers = [times[kind] for kind in ("attention", "experts")]
        return statistics.fmean(each for time in layers for each in (time.forward, time.backward))

    def timer(self, config: ModelConfig, precision: str, sequences: int, positions: int) -> UnitTimer:
        timer = UnitTimer(config, precision, sequences, positions, self.device, self.meet)
        timer.samples(self.sizes.repeats)
        return timer

    def link(self) -> dict[str, Any]:
        """Neighbours 0 and 1, 2 and 3, ... at once."""
        rank = dist.get_rank()
        peer = rank ^ 1
        large = torch.zeros(self.sizes.message_bytes, dtype=torch.uint8, device=self.device)
        self.meet()
        one_way: list[float] | None = None
        if peer < self.processes:
            latency = self.median(lambda: _ping_pong(large[:8], rank, peer), calls=20) / 2
            one_way = [latency, self.median(lambda: _ping_pong(large, rank, peer)) / 2]
        pairs = [pair for pair in self.everyone(one_way) if pair is not None]
        latency, seconds = (statistics.fmean(each) for each in zip(*pairs, strict=True))
        # On a machine that is busy, a small message may take as long as a large one.
        bandwidth = large.numel() / max(seconds - latency, seconds / 2)
        return {"link": {"gbytes_per_second": bandwidth / 1e9, "latency_us": latency * 1e6}}

    def units(self) -> dict[str, Any]:
        case = self.job["case"]
        config = ModelConfig.from_dict(case["config"])
        timer = self.timer(config, case["precision"], case["micro_batch_sequences"], case["sequence_length"])
        everyone: list[dict[str, UnitTime]] = self.everyone(timer.kinds())
        means = {kind: mean_time([each[kind] for each in everyone]) for kind in everyone[0]}
        return {"units": {kind: dataclasses.asdict(time) for kind, time in means.items()}}


def _multiply(x: torch.Tensor, weights: Iterator[torch.Tensor]) -> torch.Tensor:
    return x @ next(weights)


def _ping_pong(x: torch.Tensor, rank: int, peer: int) -> None:
    for sender in (0, 1):
        if rank % 2 == sender:
            dist.send(x, peer)
        else:
            dist.recv(x, peer)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement: "rates", "link" or "units"."""
    found: dict[str, Any] = getattr(_Worker(job), job["what"])()
    return found


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    if launch.world_rank() == 0:
        print(json.dumps(result))
    launch.shut_down()
