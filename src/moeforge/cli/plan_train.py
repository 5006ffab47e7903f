"""`moeforge plan train`: which rank runs what, what it costs, and why."""

from __future__ import annotations

import dataclasses
import json as json_format
import math
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.config.hardware import HardwareProfile
    from moeforge.config.model import ModelConfig
    from moeforge.config.schema import TrainConfig
    from moeforge.plan.planner import Plan
    from moeforge.plan.search import Found

Target = Literal["megatron", "torchtitan"]


def train(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG.toml|MODEL", help="A training file; or a model: preset, directory, hub id.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as train.batch_sequences=512; repeatable."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="NODESxDEVICES-NAME (192x8-a800, 8x8-h100, 1x2-cpu, ...) or a calibrated TOML file."),
    ] = None,
    memory_gbytes: Annotated[
        float | None, typer.Option(min=0.001, help="Memory of a device that may be used, 10^9 bytes.")
    ] = None,
    whole_layers: Annotated[
        bool, typer.Option("--whole-layers", help="No stage boundary between a layer's attention and feed-forward.")
    ] = False,
    world: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Without --cluster: number of processes; default as [parallel] needs."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here, for `moeforge train --plan`.")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw the simulated step here (.svg or .png).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the simulated step as a Chrome/Perfetto trace.")] = None,
    export: Annotated[
        Target | None, typer.Option(help="Also give the split as Megatron's layout string or torchtitan's modules.")
    ] = None,
    json: Json = False,
) -> None:
    """Plan a training run: stages, recomputation, expert mode, schedule and micro-batch.

    With --cluster, what [parallel] and train.micro_batch_sequences leave open is chosen for the smallest simulated
    step; what they decide is kept. Without it the layout is the one that [parallel] says, on devices like this one.
    """
    from moeforge.config.clusters import load_hardware
    from moeforge.plan.planner import uniform_plan

    if cluster is not None and world is not None:
        raise UserError(f"--world {world}: must be absent with --cluster, which has its number of devices")
    outputs = [path.absolute() for path in (out, timeline, trace) if path is not None]
    if len(set(outputs)) < len(outputs):
        raise UserError("--out, --timeline, --trace: must be different files")
    if timeline is not None:
        from moeforge.report.save import picture_format, require_directory

        picture_format(timeline)
        require_directory(timeline)
    hardware = None if cluster is None else load_hardware(cluster)
    run, model = read_request(target, settings or [], hardware)
    if run.data.sequence_length > model.max_positions:
        length = run.data.sequence_length
        raise UserError(f"data.sequence_length = {length}: {run.model.path} has only {model.max_positions} positions")
    if hardware is None:
        hardware = _like_here(run, world)
    if memory_gbytes is not None:
        if not math.isfinite(memory_gbytes):
            raise UserError(f"--memory-gbytes {memory_gbytes}: must be a finite number")
        hardware = hardware.model_copy(update={"memory_gbytes": memory_gbytes, "usable_memory": 1.0})
    plan, found = _plan(run, model, hardware, cluster is not None, whole_layers, said_keys(settings))
    uniform = uniform_plan(hardware, plan.work, plan.arrangement)
    exported = _export(plan, export)
    if out is not None:
        plan.layout.write(out)
    if timeline is not None:
        from moeforge.report.timeline import draw_timeline

        draw_timeline(plan.simulation, timeline, title=f"{target}: {plan.arrangement.describe()}")
    if trace is not None:
        from moeforge.files import write_whole
        from moeforge.plan.trace import chrome_trace

        write_whole(trace, json_format.dumps(chrome_trace(plan.simulation)) + "\n")
    result = _result(target, run, plan, uniform, found) | exported | {"out": None if out is None else str(out)}

    def human() -> Any:
        from moeforge.cli.plan_tables import plan_report

        return plan_report(result)

    emit(result, json, human)


def read_request(target: str, settings: list[str], hardware: HardwareProfile | None) -> tuple[TrainConfig, ModelConfig]:
    """The run and its model; for a model alone, a run of default size on this cluster."""
    from moeforge.cli.models import model_config
    from moeforge.config.toml import config_of, load_config
    from moeforge.plan.request import default_batch

    if target.endswith(".toml"):
        run = load_config(target, settings)
        return run, model_config(run.model.path)
    model = model_config(target)
    data: dict[str, Any] = {
        "model": {"path": target},
        "data": {"train": [{"path": "not-read"}], "sequence_length": min(model.max_positions, 8192)},
    }
    keys = {setting.partition("=")[0].strip(): setting for setting in settings}
    if "model.path" in keys:
        raise UserError(f"--set {keys['model.path']}: the model is {target} already; leave it out")
    if hardware is not None and "train.batch_sequences" not in keys:
        length = config_of(deepcopy(data), [keys[key] for key in keys if key == "data.sequence_length"])
        data["train"] = {"batch_sequences": default_batch(length.data.sequence_length, hardware)}
    run = config_of(data, settings)
    return run, model


def said_keys(settings: list[str] | None) -> set[str]:
    """The dotted keys that the command line sets."""
    return {setting.partition("=")[0].strip() for setting in settings or []}


def _like_here(run: TrainConfig, world: int | None) -> HardwareProfile:
    """One node of devices like this machine's, as many as there are processes."""
    from moeforge.config.clusters import DEVICES

    parallel = run.parallel
    count = world or parallel.pp * max(1, parallel.dp) * parallel.tp
    name = "cpu"
    if run.model.device != "cpu":
        import torch

        if torch.cuda.is_available():
            found = torch.cuda.get_device_name()
            name = next((known for known in DEVICES if known in found.lower()), "")
            if not name:
                raise UserError(
                    f"--cluster: missing, and no preset is like this machine's {found}; name one of "
                    f"{', '.join(DEVICES)} (as 1x{count}-h100), or a file that moeforge bench calibrate wrote"
                )
    return DEVICES[name].model_copy(update={"name": f"1x{count}-{name}", "devices_per_node": count})


def _plan(
    run: TrainConfig, model: ModelConfig, hardware: HardwareProfile, choose: bool, whole_layers: bool, said: set[str]
) -> tuple[Plan, Found | None]:
    """The plan, and what was found on the way; None where the training file decides everything."""
    from moeforge.config.parallel import layout_for
    from moeforge.plan.advice import advise
    from moeforge.plan.planner import evaluate
    from moeforge.plan.request import arrangement_of, request_of, workload_of
    from moeforge.plan.search import search, work_of

    parallel = run.parallel
    if parallel.tp_weights:
        weights = list(parallel.tp_weights)
        raise UserError(f"parallel.tp_weights = {weights}: the planner costs equal ranks; leave it out")
    decided = parallel.stages or parallel.recompute_layers or run.model.recompute != "none"
    if not choose or decided:
        micro = run.train.micro_batch_sequences
        layout = dataclasses.replace(layout_for(run, model, hardware.devices), micro_batch_sequences=micro)
        arrangement = arrangement_of(layout, micro)
        work = work_of(workload_of(run, model), arrangement)
        return evaluate(hardware, work, arrangement, layout), None
    request = request_of(run, model, said)
    console = stderr_console()
    with console.status("planning") as status:
        found = search(
            hardware, request.work, request.fixed, whole_layers, lambda stage: status.update(f"planning: {stage}")
        )
        if found.best is None:
            raise UserError(advise(hardware, request.work, request.fixed))
    return found.best, found


def _export(plan: Plan, target: Target | None) -> dict[str, Any]:
    if target is None:
        return {}
    from moeforge.plan.exports import megatron_layout, torchtitan_modules

    made = {"megatron": megatron_layout, "torchtitan": torchtitan_modules}[target](plan.layout, plan.work.model)
    return {"export": {"target": target, "text": made.text, "notes": list(made.notes)}}


def _result(target: str, run: TrainConfig, plan: Plan, uniform: Plan, found: Found | None) -> dict[str, Any]:
    from moeforge.parallel.rank_memory import rank_memory
    from moeforge.plan.memory import bytes_per_parameter, unit_memory
    from moeforge.plan.summary import alternative, figures, reasons

    model, layout, work = plan.work.model, plan.layout, plan.work
    units = unit_memory(model, work.precision, work.optimizer)
    each = bytes_per_parameter(work.precision, work.optimizer)
    sizes = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "total_bytes")
    return {
        "model": run.model.path,
        "target": target,
        "cluster": plan.hardware.name,
        "precision": work.precision,
        "sequence_length": work.sequence_length,
        "batch_sequences": work.batch_sequences,
        "micro_batch_sequences": work.micro_batch_sequences,
        "micro_batches": work.micro_batches,
        "world_size": layout.world_size,
        **{key: getattr(layout, key) for key in ("pp", "dp", "tp", "ep", "etp", "expert_dp", "schedule", "chunks")},
        "expert_mode": plan.arrangement.expert_mode if model.moe else None,
        "params_total": model.parameters(),
        "params_active": model.parameters(active=True),
        **{key: sum(getattr(unit, key) for unit in units) for key in sizes},
        "bytes_per_parameter": dataclasses.asdict(each),
        **figures(plan),
        "memory_cap_bytes": plan.hardware.usable_bytes,
        "optimality_gap": plan.gap if found else None,
        "speedup": uniform.step_seconds / plan.step_seconds,
        "uniform": figures(uniform),
        "why": reasons(plan, uniform, found),
        "alternatives": [alternative(other, plan) for other in found.others] if found else [],
        "considered": found.considered if found else 1,
        "planned": found.planned if found else 0,
        "ranks": rank_memory(model, layout, each, work.zero),
        "units": [{**dataclasses.asdict(unit), "total_bytes": unit.total_bytes} for unit in units],
        "layout": json_format.loads(layout.to_json()),
    }
