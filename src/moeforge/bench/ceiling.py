"""The matmul rate of this machine: what a training step could reach if it did nothing else."""

from __future__ import annotations

import time

import torch


def matmul_ceiling(dtype: torch.dtype, rows: int = 1024, inner: int = 576, columns: int = 3072) -> float:
    """Best GFLOP/s (2 M N K) of x[M,K] @ w[N,K]^T over many weights in turn, so that they come from memory."""
    x = torch.randn(rows, inner, dtype=dtype)
    weights = [torch.randn(columns, inner, dtype=dtype) for _ in range(16)]
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        for w in weights:
            x @ w.t()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns * len(weights) / best / 1e9
