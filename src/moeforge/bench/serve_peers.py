"""Which processes the serving benchmark starts for whom: interpreters, settings and modes of each engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeforge.errors import UserError

PEERS = ("hf", "vllm", "llama.cpp")
_MADE = {"vllm": "vllm/.done", "llama.cpp": "llama.cpp/.done"}


def check_peers(against: Sequence[str], peers_dir: Path | None) -> None:
    """Raises UserError for an unknown peer, or one that `benchmarks/peers.sh` sets up and that is not there."""
    for peer in against:
        if peer not in PEERS:
            raise UserError(f"--against {peer}: must be one of {', '.join(PEERS)}")
        if peer not in _MADE:
            continue
        if peers_dir is None:
            raise UserError(f"--peers-dir: missing; {peer} needs the folder that benchmarks/peers.sh has filled")
        if not (peers_dir / _MADE[peer]).exists():  # the last thing that the script makes
            raise UserError(f"--peers-dir {peers_dir}: {peer} is not set up there; run benchmarks/peers.sh {peers_dir}")


def cores() -> list[int]:
    """Numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def python_sides(name: str, model: Path, peers_dir: Path | None, most: int, max_model_len: int) -> list[dict[str, Any]]:
    """Keyword arguments of `WorkerSide`, one process each, for ours, hf or vllm.

    `most` requests run at once. Token ids in, token ids out: nobody loads a tokenizer.
    """
    engine = {
        "max_num_seqs": most, "enable_prefix_caching": False, "max_model_len": max_model_len,
        "skip_tokenizer_init": True,
    }  # fmt: skip
    job = {"side": name, "model": str(model)}
    if name == "moeforge":
        return [{"python": sys.executable, "job": job | {"engine": engine}}]
    if name == "hf":
        # Its third, batched_mm, gathers the weights of every token: 7 GB a layer for 32 prompts of 64.
        return [{"python": sys.executable, "job": job, "modes": ("grouped_mm", "eager")}]
    assert peers_dir is not None
    home = peers_dir / "vllm"
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    # Its manual advises to load Intel's OpenMP, which its package brings, before all else; neither is always faster.
    preloads = ["", *map(str, sorted((home / "lib").glob("libiomp5.so")))]
    return [
        {
            "python": home / "bin" / "python",
            "job": job | {"engine": engine | {"dtype": "bfloat16", "enforce_eager": eager}},
            "modes": (f"{'enforce_eager' if eager else 'compiled'}, {'Intel' if preload else 'GNU'} OpenMP",),
            "environment": environment | ({"LD_PRELOAD": preload} if preload else {}),
        }
        for eager in (True, False)
        for preload in preloads
    ]
