"""`moeforge inspect MODEL`: what a model is made of."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.output import Json, emit

if TYPE_CHECKING:
    from rich.console import Group

    from moeforge.config.model import ModelConfig


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model directory, a GGUF file, a hub id or a preset.")
    ],
    json: Json = False,
) -> None:
    """Show a model's configuration, its parameters total and active, and its units one by one."""
    from moeforge.checkpoint import open_checkpoint

    config = open_checkpoint(model).config
    result = describe(config)
    emit({"model": model, **result}, json, lambda: _human(config, result))


def describe(config: ModelConfig) -> dict[str, Any]:
    """Configuration and parameter counts, whole and by unit in forward order."""
    from moeforge.layout import unit_names
    from moeforge.plan.memory import unit_kind

    return {
        "family": config.family,
        "layers": config.num_layers,
        "moe_layers": list(config.moe_layers),
        "params_total": config.parameters(),
        "params_active": config.parameters(active=True),
        "fingerprint": config.fingerprint(),
        "config": asdict(config),
        "units": [
            {
                "unit": unit,
                "kind": unit_kind(config, unit),
                "params": config.unit_parameters(unit),
                "params_active": config.unit_parameters(unit, active=True),
            }
            for unit in unit_names(config)
        ],
    }


def _human(config: ModelConfig, result: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, text in _facts(config, result).items():
        facts.add_row(name, text)
    units = Table("units", "kind", "parameters each", "active each", box=None, pad_edge=False)
    for column in units.columns[2:]:
        column.justify = "right"
    for names, unit, _ in unit_runs(result["units"]):
        units.add_row(names, unit["kind"], f"{unit['params']:,}", f"{unit['params_active']:,}")
    return Group(facts, "", units)


def _facts(config: ModelConfig, result: dict[str, Any]) -> dict[str, str]:
    moe, rope = config.moe, config.rope
    facts = {
        "family": config.family,
        "parameters": f"{result['params_total']:,} ({result['params_active']:,} active)",
        "layers": f"{config.num_layers}, {len(config.moe_layers)} of them with experts",
        "hidden": f"{config.hidden_size}, feed-forward {config.ffn_size}",
        "attention": f"{config.num_heads} heads, {config.num_kv_heads} KV heads, {config.head_dim} each",
        "positions": f"{config.max_positions:,}, rotary base {rope.theta:,.0f} ({rope.kind})",
        "vocabulary": f"{config.vocab_size:,}, embeddings {'tied' if config.tie_embeddings else 'not tied'}",
    }
    if moe is not None:
        norm = "off" if moe.gate_norm is None else f"lambda {moe.gate_norm:g}"
        facts["experts"] = f"{moe.num_experts}, top {moe.top_k}, {moe.expert_size} wide"
        facts["gate normalisation"] = norm
    return facts


def unit_runs(units: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Units with the same figures together, in the order of their first: ("layers.0-29.attention", figures, names)."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for unit in units:
        groups.setdefault((unit["kind"], unit["params"], unit["params_active"]), []).append(unit)
    named = [([unit["unit"] for unit in group], group[0]) for group in groups.values()]
    return [(_span(names), unit, names) for names, unit in named]


def _span(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = int(names[0].split(".")[1]), int(names[-1].split(".")[1])
    some = "" if last - first + 1 == len(names) else f" ({len(names)} of them)"
    return f"layers.{first}-{last}.{names[0].rsplit('.', 1)[-1]}{some}"
