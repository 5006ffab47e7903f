"""`moeforge bench train`: optimiser steps a second against transformers, alternating runs of fresh processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeforge.bench.ceiling import matmul_ceiling
from moeforge.config.model import ModelConfig
from moeforge.errors import RunError

IMPLEMENTATIONS = ("grouped_mm", "eager")
"""transformers' expert implementations; its third, batched_mm, gathers weights per token (7 GB here) and fails."""
RATIOS = {
    "ratio_bf16_pure": ("bf16_pure", "bf16_pure"),
    "ratio_bf16_master": ("bf16", "bf16_pure"),
    "ratio_fp32": ("fp32", "fp32"),
}
Note = Callable[[str], None]


@dataclass
class TrainBench:
    """One upcycled model directory (Mixtral form, so both sides compute the same) and one stream of tokens."""

    model: Path
    tokens: Path
    config: ModelConfig
    sequences: int = 4
    positions: int = 256
    runs: int = 5
    steps: int = 2
    note: Note = field(default=print)

    def run(self, ratios: list[str]) -> dict[str, Any]:
        """Ratios of median step rates, ours over the best peer's, each from `runs` alternating processes a side."""
        result: dict[str, Any] = {
            "tokens_a_step": self.sequences * self.positions,
            "experts": self.config.moe.num_experts if self.config.moe else 0,
            "flop_convention": "6 x active parameters a token, embedding counted once as the head; no attention scores",
            "flop_per_token": self.flop_per_token(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_gflops": {
                "bf16": matmul_ceiling(torch.bfloat16),
                "fp32": matmul_ceiling(torch.float32),
            },
        }
        best: dict[str, str] = {}
        for name in ratios:
            mine, theirs = RATIOS[name]
            if theirs not in best:
                best[theirs] = self._best_peer(theirs)
            result |= self._compare(name, mine, theirs, best[theirs], result["matmul_gflops"])
        result["peer_implementation"] = best
        return result

    def flop_per_token(self) -> float:
        """Training FLOPs of one token: 6 a weight that it meets (tied embedding: once, as the head)."""
        weights = self.config.parameters(active=True)
        if not self.config.tie_embeddings:
            weights -= self.config.vocab_size * self.config.hidden_size
        return 6.0 * weights

    def _best_peer(self, precision: str) -> str:
        rates = {}
        for experts in IMPLEMENTATIONS:
            seconds = self._worker("transformers", precision, experts=experts, steps=1)["step_seconds"]
            rates[experts] = min(seconds)
            self.note(f"transformers {experts} {precision}: {seconds[0]:.2f} s a step")
        return min(rates, key=lambda experts: rates[experts])

    def _compare(self, name: str, mine: str, theirs: str, experts: str, ceiling: dict[str, float]) -> dict[str, Any]:
        sides: dict[str, list[dict[str, Any]]] = {"moeforge": [], "transformers": []}
        for index in range(self.runs):
            sides["moeforge"].append(self._worker("moeforge", mine, profile=index == 0))
            sides["transformers"].append(self._worker("transformers", theirs, experts=experts))
            pair = [statistics.median(runs[-1]["step_seconds"]) for runs in sides.values()]
            self.note(
                f"{name} run {index + 1}/{self.runs}: {pair[0]:.2f} s against {pair[1]:.2f} s, {pair[1] / pair[0]:.2f}x"
            )
        seconds = {side: [statistics.median(run["step_seconds"]) for run in runs] for side, runs in sides.items()}
        tokens = self.sequences * self.positions
        rate = {side: tokens / statistics.median(times) for side, times in seconds.items()}
        used = rate["moeforge"] * self.flop_per_token() / 1e9
        return {
            name: statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
            name.replace("ratio", "detail"): {
                "step_seconds": seconds,
                "tokens_per_second": rate,
                "share_of_matmul_ceiling": used / ceiling["fp32" if mine == "fp32" else "bf16"],
                "first_loss": {side: runs[0]["losses"][0] for side, runs in sides.items()},
                "peak_rss_bytes": {side: max(run["peak_rss_bytes"] for run in runs) for side, runs in sides.items()},
                "profile": sides["moeforge"][0]["profile"],
            },
        }

    def _worker(
        self, side: str, precision: str, experts: str = "", steps: int = 0, profile: bool = False
    ) -> dict[str, Any]:
        job = {
            "side": side, "precision": precision, "experts": experts, "model": str(self.model), "profile": profile,
            "tokens": str(self.tokens), "sequences": self.sequences, "positions": self.positions, "lr": 1e-5,
            "warmup": 2, "steps": steps or self.steps,
        }  # fmt: skip
        command = [sys.executable, "-m", "moeforge.bench.train_worker", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"bench train: the {side} {precision} process failed: {last}")
        return json.loads(done.stdout.strip().splitlines()[-1])
