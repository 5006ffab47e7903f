"""The numbers of a run that stand at the top of its report, and the last numbers of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeforge.report.canvas import compact, rounded
from moeforge.report.runs import LAYER_KEYS, Array, Run
from moeforge.report.series import mean_over_layers


@dataclass(frozen=True)
class Fact:
    """One line of the summary: a name, its value for the reader, and what to know about it."""

    name: str
    value: str
    note: str = ""


def summarize(run: Run) -> dict[str, Any]:
    """The numbers of a run (NaN or None where it has none), as in `moeforge report --json`.

    `loss_before` and `loss_after` are means over the first and last `loss_window_steps` rows; `drop_rate` and
    `max1_over_max2` are means over layers and over as many last rows; `tokens_per_second` is the median;
    `aux_coef_*` span layers and time.
    """
    loss = run["loss"][np.isfinite(run["loss"])]
    window = max(1, min(20, len(loss) // 10))
    held_out = run["eval_loss"][np.isfinite(run["eval_loss"])]
    drop = mean_over_layers(run.by_layer["drop_rate"])
    drop = drop[np.isfinite(drop)]
    decided = mean_over_layers(run.by_layer["max1_over_max2"])
    decided = decided[np.isfinite(decided)]
    alpha = run.by_layer["aux_coef"][np.isfinite(run.by_layer["aux_coef"])]
    model, moe = run.model, run.model.moe if run.model else None
    return {
        "name": run.name,
        "run_dir": str(run.path),
        "parameters_total": model.parameters() if model else None,
        "parameters_active": model.parameters(active=True) if model else None,
        "moe_layers": len(run.layers),
        "experts": moe.num_experts if moe else None,
        "top_k": moe.top_k if moe else None,
        "gate_norm": moe.gate_norm if moe else None,
        "steps": run.steps,
        "tokens": _last(run["tokens"]),
        "loss_before": _mean(loss[:window]),
        "loss_after": _mean(loss[-window:]),
        "loss_window_steps": window,
        "eval_loss_before": float(held_out[0]) if len(held_out) > 1 else math.nan,
        "eval_loss_after": _last(held_out),
        "drop_rate": _mean(drop[-window:]),
        "aux_coef_min": float(alpha.min()) if len(alpha) else math.nan,
        "aux_coef_max": float(alpha.max()) if len(alpha) else math.nan,
        "expert_similarity": _last(mean_over_layers(run.by_layer["expert_similarity"])),
        "max1_over_max2": _mean(decided[-window:]),
        "tokens_per_second": _median(run["tokens_per_second"]),
        "seconds": float(np.nansum(run["seconds"])),
        "notes": list(run.notes),
    }


def facts(summary: dict[str, Any]) -> list[Fact]:
    """The summary for a reader. Dense runs have the facts about routing too (as dashes), so runs compare."""
    s, window = summary, summary["loss_window_steps"]
    span = f"mean of the first and last {window} steps" if window > 1 else "first and last step"
    experts = f"{s['experts']}, top-{s['top_k']}" if s["experts"] else "dense"
    norm = "off" if s["experts"] and s["gate_norm"] is None else number(s["gate_norm"])
    alpha_known = not math.isnan(s["aux_coef_max"])
    return [
        Fact("Held-out loss", _change(s["eval_loss_before"], s["eval_loss_after"]), "first and last evaluation"),
        Fact("Training loss", _change(s["loss_before"], s["loss_after"]), span),
        Fact("Drop rate", percent(s["drop_rate"]), "assignments over capacity, at the end"),
        Fact(
            "α range",
            f"{rounded(s['aux_coef_min'])} – {rounded(s['aux_coef_max'])}" if alpha_known else "–",
            "over all layers and steps",
        ),
        Fact("Expert similarity", number(s["expert_similarity"]), "mean pairwise cosine; copies have 1"),
        Fact("Max1 / Max2", rounded(s["max1_over_max2"]), "of the gate at the end; 1 is undecided"),
        Fact("Speed", f"{rounded(s['tokens_per_second'])} tokens/s", "median step"),
        Fact(
            "Trained",
            f"{rounded(s['tokens'])} tokens",
            f"{s['steps']:,} optimiser steps" if s["steps"] != 1 else "1 optimiser step",
        ),
        Fact("Wall time", duration(s["seconds"]), "in training steps"),
        Fact(
            "Parameters",
            _parameters(s["parameters_total"]),
            f"{_parameters(s['parameters_active'])} active a token",
        ),
        Fact("Experts", experts, f"{s['moe_layers']} MoE layers" if s["moe_layers"] else "no MoE layers"),
        Fact("Gate norm λ", norm, "of the gate logits"),
    ]


def layer_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Column names and one row a MoE layer: its last recorded numbers."""
    names = ["layer", "drop rate", "α", "aux loss", "load max/mean", "gate entropy", "Max1/Max2", "Max2/Max3"]
    names.append("expert similarity")
    rows = []
    for i, layer in enumerate(run.layers):
        last = {key: _last(run.by_layer[key][:, i]) for key in LAYER_KEYS}
        cells = [percent(last[key]) if key == "drop_rate" else number(last[key]) for key in LAYER_KEYS]
        rows.append([str(layer), *cells])
    return names, rows


def number(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return "–" if value is None else compact(value)


def percent(value: float) -> str:
    """A share as a percentage with three significant digits."""
    return "–" if math.isnan(value) else f"{compact(float(f'{100 * value:.3g}'))} %"


def duration(seconds: float) -> str:
    """12 s, 4 min 10 s, 3 h 25 min."""
    if math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _change(before: float, after: float) -> str:
    if math.isnan(before):
        return "–" if math.isnan(after) else f"{after:.3f}"
    return f"{before:.3f} → {after:.3f}"


def _parameters(count: int | None) -> str:
    return "–" if count is None else rounded(count)


def _last(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


def _median(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan
