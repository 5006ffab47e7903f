"""`moeforge plan`: place a model before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeforge.cli.output import Json, emit
from moeforge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from moeforge.config.model import ModelConfig
    from moeforge.layout import Layout
    from moeforge.plan.memory import BytesPerParameter, UnitMemory


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The training file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as optimizer.lr=3e-4; may be repeated."),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of processes; by default as few as [parallel] names."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the layout here, for `moeforge train --plan`.")] = None,
    json: Json = False,
) -> None:
    """Layout of a training run after its [parallel] table, and the memory of every rank."""
    from moeforge.config.parallel import layout_for
    from moeforge.config.toml import load_config
    from moeforge.plan.memory import bytes_per_parameter, unit_memory

    run = load_config(config, settings or [])
    model = _model_config(run.model.path)
    parallel = run.parallel
    layout = layout_for(run, model, world or parallel.pp * max(1, parallel.dp) * parallel.tp)
    units = unit_memory(model, run.model.precision, run.optimizer.kind)
    if out is not None:
        layout.write(out)
    accounting = bytes_per_parameter(run.model.precision, run.optimizer.kind)
    result = {
        "model": run.model.path,
        "precision": run.model.precision,
        "world_size": layout.world_size,
        **{key: getattr(layout, key) for key in ("pp", "dp", "tp", "ep", "etp", "expert_dp", "schedule", "chunks")},
        "params_total": model.parameters(),
        "params_active": model.parameters(active=True),
        **_bytes(units),
        "bytes_per_parameter": dataclasses.asdict(accounting),
        "stages": [_stage(layout, index, units) for index in range(len(layout.stages))],
        "ranks": _ranks(model, layout, accounting, parallel.zero),
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


def _stage(layout: Layout, index: int, units: tuple[UnitMemory, ...]) -> dict[str, Any]:
    """A stage as a whole, whatever number of ranks share it."""
    stage = layout.stages[index]
    own = units[stage.begin_unit : stage.end_unit]
    halves = sum(unit.unit.startswith("layers.") for unit in own)
    return {
        "pp_rank": layout.pp_rank_of(index),
        "layers": halves // 2 if halves % 2 == 0 else halves / 2,
        "units": [stage.begin_unit, stage.end_unit],
        "recompute_layers": len({unit.rpartition(".")[0] for unit in stage.recompute}),
        "recompute_units": list(stage.recompute),
        **_bytes(own),
    }


def _ranks(model: ModelConfig, layout: Layout, each: BytesPerParameter, zero: bool) -> list[dict[str, Any]]:
    """What every rank keeps: its parts of its stages, and the optimizer state of those, or with ZeRO of its share."""
    from moeforge.parallel.parameters import ParameterPart, chunk_of, parameter_parts

    @functools.cache
    def parts(pp: int, tp: int, expert_rank: int) -> tuple[ParameterPart, ...]:
        own: dict[str, ParameterPart] = {}  # by name: chunks of one rank share a tied embedding
        for stage in layout.stages_of(pp):
            own |= parameter_parts(model, layout, stage, tp, expert_rank)
        return tuple(own.values())

    rows = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        copies = {
            "dp": (layout.dp, at.dp),
            "dp_tp": (layout.dp * layout.tp, at.dp * layout.tp + at.tp),
            "expert_dp": (layout.expert_dp, at.expert_dp),
        }
        params = owned = 0
        for part in parts(at.pp, at.tp, at.expert_rank):
            begin, end = chunk_of(part.numel, *copies[part.reduce]) if zero else (0, part.numel)
            params += part.numel
            owned += end - begin
        sizes = {
            "weight_bytes": params * each.weights,
            "gradient_bytes": params * each.gradients,
            "optimizer_bytes": owned * each.optimizer,
        }
        rows.append(
            {"rank": rank, **dataclasses.asdict(at), "params": params, **sizes, "total_bytes": sum(sizes.values())}
        )
    return rows


def _bytes(units: tuple[UnitMemory, ...]) -> dict[str, int]:
    keys = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "total_bytes")
    return {key: sum(getattr(unit, key) for unit in units) for key in keys}


def _human(result: dict[str, Any], units: tuple[UnitMemory, ...]) -> Group:
    from rich.console import Group
    from rich.text import Text

    each = result["bytes_per_parameter"]
    one = result["world_size"] == 1
    facts = (
        f"{result['model']}: {result['params_total']:,} parameters ({result['params_active']:,} active)\n"
        f"{result['precision']}: {each['weights']} + {each['gradients']} + {each['optimizer']} bytes "
        f"a parameter (weights + gradients + optimizer)\n{'one process' if one else _processes(result)}\n"
        "sizes in GiB, activations not counted"
    )
    tables = [_unit_table(result, units)] if one else [_unit_table(result, units), "", _rank_table(result)]
    written = f"\nlayout in {result['out']}, for moeforge train --plan" if result["out"] else ""
    return Group(Text(facts), "", *tables, Text(written))


def _processes(result: dict[str, Any]) -> str:
    return (
        "{world_size} processes = pp {pp} x dp {dp} x tp {tp}; experts: ep {ep} x etp {etp} x expert_dp {expert_dp}\n"
        "schedule {schedule}, {chunks} stages a rank"
    ).format(**result)


def _unit_table(result: dict[str, Any], units: tuple[UnitMemory, ...]) -> Table:
    recomputed = {name for stage in result["stages"] for name in stage["recompute_units"]}
    table = _table("units", "count", "recomputed", "M params", *_SIZES)
    for kind in dict.fromkeys(unit.kind for unit in units):
        own = tuple(unit for unit in units if unit.kind == kind)
        again = sum(unit.unit in recomputed for unit in own)
        params = sum(unit.params for unit in own)
        table.add_row(kind, str(len(own)), str(again), f"{params / 1e6:,.1f}", *_sizes(_bytes(own)))
    total = f"{result['params_total'] / 1e6:,.1f}"
    table.add_row("all", str(len(units)), str(len(recomputed)), total, *_sizes(result), style="bold")
    return table


def _rank_table(result: dict[str, Any]) -> Table:
    """A row for each pipeline rank: of its dp x tp ranks the one that keeps most."""
    table = _table("pp rank", "layers", "recomputed", "M params", *_SIZES)
    for pp in range(result["pp"]):
        stages = [stage for stage in result["stages"] if stage["pp_rank"] == pp]
        largest = max((row for row in result["ranks"] if row["pp"] == pp), key=lambda row: row["total_bytes"])
        layers, again = (" + ".join(str(stage[key]) for stage in stages) for key in ("layers", "recompute_layers"))
        table.add_row(str(pp), layers, again, f"{largest['params'] / 1e6:,.1f}", *_sizes(largest))
    return table


_SIZES = ("weights", "gradients", "optimizer", "total")


def _table(first: str, *figures: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def _sizes(figures: dict[str, int]) -> list[str]:
    keys = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "total_bytes")
    return [f"{figures[key] / 2**30:,.2f}" for key in keys]
