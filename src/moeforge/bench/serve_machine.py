"""What the machine gives, in the run of the serving benchmark: matmul rate and memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from moeforge.bench.ceiling import matmul_ceiling


def _best_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def machine(buffer_bytes: int = 2**28) -> dict[str, Any]:
    """Threads, torch, GFLOP/s of bf16 and fp32 matmuls, GB/s of reading one buffer and of copying it (read + write)."""
    x = torch.ones(buffer_bytes // 4)
    y = torch.empty_like(x)
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_gflops": {"bf16": matmul_ceiling(torch.bfloat16), "fp32": matmul_ceiling(torch.float32)},
        "read_gbytes_per_second": buffer_bytes / _best_seconds(x.sum) / 1e9,
        "copy_gbytes_per_second": 2 * buffer_bytes / _best_seconds(lambda: y.copy_(x)) / 1e9,
    }
