"""Measuring tile sizes on this device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_weight import BLOCK, GROUP_ROWS, Activations, Fp8Weight
from moeforge.kernels.triton.configs import BUCKETS, Config, Kind
from moeforge.kernels.triton.grouped_matmul import grouped_matmul
from moeforge.kernels.triton.weight_grad import grouped_weight_grad

KINDS: tuple[Kind, ...] = ("16-bit", "weight-only", "w8a8", "weight-grad")
SHAPES = ((16, 12288, 4608), (16, 4608, 6144))
"""Experts, outputs, inputs: a Skywork-MoE expert's two matmuls on one of two ranks."""
_MOST_PROCESSES, _PROCESS_BYTES = 12, 6 * 2**30


def tune(device: torch.device) -> dict[str, dict[int, dict[str, int]]]:
    """The fastest configuration of each kind and bucket of rows, as `configs.table_path(device name)` is to hold it.

    Takes a minute or more on a GPU, most of it to compile, which several processes do first, into Triton's cache.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        _compile_all(device, min(len(os.sched_getaffinity(0)), free // _PROCESS_BYTES, _MOST_PROCESSES))
    return {kind: {rows: _fastest(kind, rows, device)._asdict() for rows in BUCKETS} for kind in KINDS}


def candidates(kind: Kind, rows: int) -> Iterator[Config]:
    """What is worth trying: 64 weight rows at least, so that sm_90 sums all in the same instructions."""
    heights = [rows] if rows <= 16 else [rows // 2, rows]
    for block_m in [64, 128] if kind == "weight-grad" else heights:
        for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
            for num_stages in (2, 3, 4) if kind == "weight-grad" or rows == 128 else (3, 4, 6):
                yield Config(block_m, block_n, num_warps, num_stages)


def _compile_all(device: torch.device, processes: int) -> None:
    """What fails here is compiled later, one after the other."""
    if processes < 2:
        return
    jobs = [(kind, rows, each, device) for kind in KINDS for rows in BUCKETS for each in candidates(kind, rows)]
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_compile, jobs, chunksize=4))
    except (RuntimeError, OSError) as error:  # a GPU for one process only, no memory, a killed process
        warnings.warn(f"compiling in {processes} processes failed ({error}); it takes longer in one", stacklevel=2)


def _compile(job: tuple[Kind, int, Config, torch.device]) -> None:
    kind, rows, candidate, device = job
    for shape in SHAPES:
        with suppress(OutOfResources):
            _call(kind, rows, *shape, device)(candidate)


def _fastest(kind: Kind, rows: int, device: torch.device) -> Config:
    calls = [_call(kind, rows, *shape, device) for shape in SHAPES]
    times: dict[Config, float] = {}
    for candidate in candidates(kind, rows):
        try:
            times[candidate] = sum(_milliseconds(call, candidate) for call in calls)
        except OutOfResources:  # of shared memory: another device's
            continue
    return min(times, key=lambda config: times[config])


def _milliseconds(call: Callable[[Config], Tensor], config: Config) -> float:
    median: Any = do_bench(lambda: call(config), warmup=5, rep=20, return_mode="median")
    return float(median)


@lru_cache(maxsize=len(SHAPES))
def _call(kind: Kind, rows: int, experts: int, n: int, k: int, device: torch.device) -> Callable[[Config], Tensor]:
    """A matmul of `rows` rows for each expert."""
    x = torch.randn(experts * rows, k, device=device, dtype=torch.bfloat16)
    offsets = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * rows
    if kind == "weight-grad":
        grad = torch.randn(experts * rows, n, device=device, dtype=torch.bfloat16)
        return lambda config: grouped_weight_grad(grad, x, offsets, config)
    if kind == "16-bit":
        plain = torch.randn(experts, n, k, device=device, dtype=torch.bfloat16)
        return lambda config: grouped_matmul(x, plain, offsets, config=config)
    codes = torch.randint(0, 0x7F, (experts, n, k), device=device, dtype=torch.uint8)  # all but NaN
    scales = torch.ones(experts, -(-n // GROUP_ROWS), -(-k // BLOCK), device=device)
    weight = Fp8Weight(codes.view(E4M3), scales)
    activations: Activations = "none" if kind == "weight-only" else "dynamic"
    return lambda config: grouped_matmul(x, weight, offsets, activations, config=config)
