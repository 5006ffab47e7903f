"""`moeforge plan`: place a model before anything runs. `plan train` for one process so far."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.output import Json, emit
from moeforge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group

    from moeforge.config.model import ModelConfig
    from moeforge.plan.memory import UnitMemory


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The training file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as optimizer.lr=3e-4; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the layout here, for `moeforge train --plan`.")] = None,
    json: Json = False,
) -> None:
    """Memory of a training run, unit by unit (one process)."""
    from moeforge.config.toml import load_config
    from moeforge.layout import Layout
    from moeforge.plan.memory import bytes_per_parameter, unit_memory

    run = load_config(config, settings or [])
    model = _model_config(run.model.path)
    layout = Layout.single(model, run.model.recompute)
    units = unit_memory(model, run.model.precision, run.optimizer.kind)
    if out is not None:
        layout.write(out)
    accounting = bytes_per_parameter(run.model.precision, run.optimizer.kind)
    result = {
        "model": run.model.path,
        "precision": run.model.precision,
        "world_size": layout.world_size,
        "params_total": model.parameters(),
        "params_active": model.parameters(active=True),
        **_bytes(units),
        "bytes_per_parameter": dataclasses.asdict(accounting),
        "stages": [_stage(stage, units) for stage in layout.stages],
        "units": [{**dataclasses.asdict(unit), "total_bytes": unit.total_bytes} for unit in units],
        "layout": json_format.loads(layout.to_json()),
        "out": None if out is None else str(out),
    }
    emit(result, json, lambda: _human(result, units))


commands = {"train": train}


def _model_config(model: str) -> ModelConfig:
    """A preset, or the configuration of a checkpoint; a directory with just a config.json will do."""
    from moeforge.config.presets import PRESETS, model_preset

    path = Path(model).expanduser()
    if model in PRESETS and not path.exists():
        return model_preset(model)
    file = path / "config.json"
    if file.is_file() and not any(list(path.glob(pattern)) for pattern in ("*.safetensors*", "*.bin*")):
        from moeforge.config.hf import model_config_from_hf

        try:
            return model_config_from_hf(json_format.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error})") from error
    from moeforge.checkpoint import open_checkpoint

    return open_checkpoint(model).config


def _stage(stage: Any, units: tuple[UnitMemory, ...]) -> dict[str, Any]:
    own = units[stage.begin_unit : stage.end_unit]
    layer_units = [unit.unit for unit in own if unit.unit.startswith("layers.")]
    return {
        "layers": len({unit.rpartition(".")[0] for unit in layer_units}),
        "units": [stage.begin_unit, stage.end_unit],
        "recompute_layers": len({unit.rpartition(".")[0] for unit in stage.recompute}),
        "recompute_units": list(stage.recompute),
        **_bytes(own),
    }


def _bytes(units: tuple[UnitMemory, ...]) -> dict[str, int]:
    keys = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "total_bytes")
    return {key: sum(getattr(unit, key) for unit in units) for key in keys}


def _human(result: dict[str, Any], units: tuple[UnitMemory, ...]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    recomputed = set(result["stages"][0]["recompute_units"])
    table = Table(box=None, pad_edge=False)
    figures = ("count", "recomputed", "M params", "weights", "gradients", "optimizer", "total")
    for name in ("units", *figures):
        table.add_column(name, justify="left" if name == "units" else "right")
    for kind in dict.fromkeys(unit.kind for unit in units):
        own = tuple(unit for unit in units if unit.kind == kind)
        again = sum(unit.unit in recomputed for unit in own)
        params = sum(unit.params for unit in own)
        table.add_row(kind, str(len(own)), str(again), f"{params / 1e6:,.1f}", *_sizes(_bytes(own)))
    total = f"{result['params_total'] / 1e6:,.1f}"
    table.add_row("all", str(len(units)), str(len(recomputed)), total, *_sizes(result), style="bold")
    each = result["bytes_per_parameter"]
    facts = (
        f"{result['model']}: {result['params_total']:,} parameters ({result['params_active']:,} active)\n"
        f"{result['precision']}: {each['weights']} + {each['gradients']} + {each['optimizer']} bytes "
        "a parameter (weights + gradients + optimizer)\none process, sizes in GiB, activations not counted"
    )
    written = f"\nlayout in {result['out']}, for moeforge train --plan" if result["out"] else ""
    return Group(Text(facts), "", table, Text(written))


def _sizes(figures: dict[str, int]) -> list[str]:
    keys = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "total_bytes")
    return [f"{figures[key] / 2**30:,.2f}" for key in keys]
