"""Uneven shards against what others do with heads that do not divide: pad them with zeros until they do.

`python -m moeforge.bench.serve_padded MODEL [OUT.json]`, of a model directory. SmolLM2's 9 heads in 3 KV groups go to 2
ranks once as 2 + 1 groups that rotate from layer to layer, once padded to 12 heads in 4 groups, 2 on each rank. Both
compute the same function.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeforge.bench.serve_side import WorkerSide, Workload
from moeforge.checkpoint import load_model, open_checkpoint, save_model
from moeforge.config.model import ModelConfig
from moeforge.config.serving import EngineConfig
from moeforge.files import write_whole
from moeforge.layout import Layout, serving_layout
from moeforge.model import Transformer
from moeforge.serve.kv_cache import bytes_per_block
from moeforge.serve.memory import weight_bytes

RANKS = 2
RUNS = 5
MEMORY_BYTES = 2_000_000_000
"""Of a rank, in the comparison of what is left for keys and values."""


def pad_groups(source: Path, out: Path, groups: int) -> Path:
    """The same function with `groups` KV groups: those that are added are zero."""
    model = load_model(source)
    config = model.config
    padded = dataclasses.replace(config, num_kv_heads=groups, num_heads=groups * config.heads_per_group)
    with torch.device("meta"):
        wide = Transformer(padded)

    def grown(name: str, weight: Tensor) -> Tensor:
        shape = wide.get_parameter(name).shape
        missing = [b - a for a, b in zip(weight.shape, shape, strict=True)]
        return torch.nn.functional.pad(weight, [side for size in reversed(missing) for side in (0, size)])

    state = {name: grown(name, weight) for name, weight in model.state_dict().items()}
    wide.load_state_dict(state, assign=True)
    return save_model(wide, out, tokenizer_from=source)


def memory(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Bytes of the fullest rank, and the tokens whose keys and values fit on every rank beside the weights."""
    settings, dtype = EngineConfig(), torch.bfloat16
    weights = [weight_bytes(config, layout, rank, dtype) for rank in range(layout.tp)]
    blocks = [
        bytes_per_block(config, [end - begin for begin, end in shard.kv_groups], settings, dtype)
        for shard in layout.ranks
    ]
    fits = min((MEMORY_BYTES - weight) // block for weight, block in zip(weights, blocks, strict=True))
    return {
        "weight_bytes": weights,
        "kv_bytes_per_token": [block // settings.block_size for block in blocks],
        "kv_tokens": fits * settings.block_size,
        "rank_memory_bytes": MEMORY_BYTES,
    }


def compare(uneven: Path, scratch: Path) -> dict[str, Any]:
    """Tokens a second of both on `RANKS` processes, in alternating runs, and their memory."""
    config = open_checkpoint(uneven).config
    vocab_size, groups = config.vocab_size, config.num_kv_heads
    padded = pad_groups(uneven, scratch / "padded", -(-groups // RANKS) * RANKS)
    workloads = [Workload(str(n), n, 64, 64) for n in (1, 8)]
    sides = {}
    result: dict[str, Any] = {"ranks": RANKS, "runs": RUNS}
    for name, path in (("uneven", uneven), ("padded", padded)):
        config = open_checkpoint(path).config
        result[name] = memory(config, serving_layout(config, RANKS)) | {"tokens_per_second": {}}
        engine = {"tensor_parallel_size": RANKS, "enable_prefix_caching": False, "max_model_len": 256}
        sides[name] = WorkerSide(sys.executable, {"side": "moeforge", "model": str(path), "engine": engine})
    try:
        for workload in workloads:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for index in range(RUNS + 1):
                for name, side in sides.items():
                    run = side.run(workload, workload.prompts(vocab_size, index), "default")
                    rates[name].append(workload.rate(run["seconds"]))
            for name in sides:
                result[name]["tokens_per_second"][workload.name] = rates[name][1:]  # the first one warms up
            result[f"speed_ratio_at_{workload.name}"] = statistics.median(
                a / b for a, b in list(zip(rates["uneven"], rates["padded"], strict=True))[1:]
            )
    finally:
        for side in sides.values():
            side.close()
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(compare(Path(sys.argv[1]), Path(folder)), indent=2)
    print(text)
    if len(sys.argv) > 2:
        write_whole(Path(sys.argv[2]), text + "\n")
