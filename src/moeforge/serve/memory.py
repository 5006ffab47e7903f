"""How many pages a rank has room for."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from moeforge.config.model import ModelConfig
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.layout import Layout
from moeforge.parallel.parameters import parameter_parts
from moeforge.plan.serving_memory import RESERVED_BYTES
from moeforge.serve.kv_cache import bytes_per_block

CPU_KV_BYTES = 4 << 30


def weight_bytes(config: ModelConfig, layout: Layout, rank: int, dtype: torch.dtype) -> int:
    """Bytes of the weights that a rank holds."""
    parts = parameter_parts(config, layout, 0, rank, rank).values()
    return sum(part.numel * (part.dtype or dtype).itemsize for part in parts)


def require_memory(
    config: ModelConfig, layout: Layout, rank: int, dtype: torch.dtype, device: torch.device, free: int
) -> None:
    """Raises UserError if a rank's weights do not fit into the `free` bytes of its GPU; on CPU, all ranks' together."""
    size = str(dtype).removeprefix("torch.") if config.quantization is None else "FP8"
    if device.type == "cpu":
        needed = sum(weight_bytes(config, layout, index, dtype) for index in range(layout.tp))
        where, remedy = "in all", "a narrower dtype or a smaller model fits"
    else:
        needed, where = weight_bytes(config, layout, rank, dtype), f"on rank {rank} of {layout.tp}"
        remedy = "more ranks (tensor_parallel_size), a narrower dtype or a smaller model fit"
    if needed > free:
        raise UserError(
            f"the model's weights need {needed / 1e9:.2f} GB {where} in {size}, and {free / 1e9:.2f} GB are free "
            f"there; {remedy}: `moeforge plan serve` shows which"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that a process may still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(found.split()[1]) * 1024


def block_count(
    settings: EngineConfig,
    config: ModelConfig,
    layout: Layout,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> int:
    """Pages for which a rank that holds its weights has memory, and no more than all sequences at their longest take.

    Raises UserError if not even one sequence of `max_model_len` fits.
    """
    groups = [end - begin for begin, end in layout.ranks[rank].kv_groups]
    block = bytes_per_block(config, groups, settings, dtype)
    longest = -(-max_model_len // settings.block_size)
    most = settings.max_num_seqs * longest
    if not block:  # this rank holds no keys at all
        return most
    memory = settings.kv_cache_memory_bytes
    if memory is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = free - math.ceil(total * (1 - settings.gpu_memory_utilization)) - RESERVED_BYTES
    elif memory is None:
        memory = min(CPU_KV_BYTES, free_bytes(device) // 2) // layout.tp
    count = max(memory, 0) // block - 1  # one page more is made, for padding
    if count < longest:
        fits = max(count, 0) * settings.block_size
        raise UserError(
            f"max_model_len = {max_model_len}: the KV cache of rank {rank} has room for {fits} tokens "
            f"({max(memory, 0) / 1e9:.2f} GB at {block / settings.block_size:.0f} bytes a token); take at most "
            f"{fits}, give it more memory (kv_cache_memory_bytes, gpu_memory_utilization) or kv_cache_dtype = fp8"
        )
    return min(count, most)
