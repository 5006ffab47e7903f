"""Runs that look real: what an upcycled model's training writes, without training one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeforge.config.model import ModelConfig, MoEConfig

MakeRun = Callable[..., Path]


def model_config(layers: int, experts: int | None, gate_norm: float | None) -> ModelConfig:
    moe = MoEConfig(experts, 2, 1536, gate_norm=gate_norm) if experts else None
    return ModelConfig(49152, 576, layers, 9, 3, 64, 1536, tie_embeddings=True, moe=moe)


def sorted_gate(experts: int, sharpness: float) -> list[float]:
    gate = np.exp(-sharpness * np.arange(experts))
    return [float(g) for g in gate / gate.sum()]


def make_run(
    directory: Path,
    steps: int = 200,
    layers: int = 12,
    experts: int | None = 4,
    gate_norm: float | None = 1.0,
    seed: int = 0,
    eval_every: int = 50,
    similarity_every: int = 20,
    gate_every: int = 50,
    tokens_per_step: int = 1024,
) -> Path:
    """Write a run directory in the format that training writes; dense without `experts`."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    model = model_config(layers, experts, gate_norm)
    (directory / "model.json").write_text(json.dumps(model.to_dict()))
    (directory / "config.toml").write_text('[run]\ndir = "runs/x"\nseed = 0\n\n[router]\nalpha_max = 0.01\nxi = 0.2\n')
    alpha = np.full(layers, 0.01)
    depth = np.linspace(0, 1, layers)
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "eval_loss": 2.94}]
    for step in range(1, steps + 1):
        done = step / steps
        loss = 1.9 + 1.05 * np.exp(-5 * done)
        speed = tokens_per_step / (0.48 + 0.03 * rng.standard_normal() ** 2)
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * tokens_per_step,
            "loss": float(loss + 0.09 * rng.standard_normal()),
            "lr": float(1e-4 * min(step / (0.1 * steps), 0.1 + 0.45 * (1 + np.cos(np.pi * done)))),
            "grad_norm": float(0.7 + 2 * np.exp(-20 * done) + 0.1 * abs(rng.standard_normal())),
            "tokens_per_second": float(speed),
            "seconds": float(tokens_per_step / speed),
            "moe": [],
        }
        if eval_every and (step % eval_every == 0 or step == steps):
            row["eval_loss"] = float(loss + 0.02)
        if experts:
            settle = np.exp(-4 * done * (1 + depth))
            drop = np.clip(0.012 * (1.5 - depth) + 0.16 * settle + 0.006 * rng.standard_normal(layers), 0, 1)
            alpha = 0.97 * alpha + 0.03 * np.minimum(0.2 * drop, 0.01)
            sharp = (1.0 if gate_norm else 0.25) * (0.4 + 0.5 * done * (0.5 + depth))
            for i in range(layers):
                skew = rng.dirichlet(np.full(experts, 12 + 60 * done))
                entry = {
                    "layer": i,
                    "drop_rate": float(drop[i]),
                    "aux_coef": float(alpha[i]),
                    "aux_loss": float(0.002 + 0.01 * settle[i]),
                    "load_max_over_mean": float(skew.max() * experts),
                    "gate_entropy": float(np.log(experts) - sharp[i] * 0.4),
                    "max1_over_max2": float(1 + 1.3 * sharp[i] + 0.02 * rng.standard_normal()),
                    "max2_over_max3": float(1 + 0.7 * sharp[i] + 0.02 * rng.standard_normal()),
                    "load": [float(share) for share in skew],
                }
                if similarity_every and (step % similarity_every == 0 or step == 1):
                    entry["expert_similarity"] = float(1 - (0.02 + 0.05 * depth[i]) * (1 - np.exp(-3 * done)))
                row["moe"].append(entry)
            if gate_every and (step % gate_every == 0 or step == 1):
                row["gate_distribution"] = [
                    {
                        "layer": i,
                        "sorted_mean": sorted_gate(experts, float(sharp[i])),
                        "sorted_mean_unnormalised": sorted_gate(experts, float(sharp[i]) * (0.3 if gate_norm else 1)),
                    }
                    for i in range(layers)
                ]
        rows.append(row)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def fake_run(tmp_path: Path) -> MakeRun:
    """fake_run(name, **settings): a run directory of that name."""
    return lambda name="run", **settings: make_run(tmp_path / name, **settings)
