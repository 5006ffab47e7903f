"""`moeforge plan compare`: the expert modes of one cluster shape side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit
from moeforge.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group

    from moeforge.config.hardware import HardwareProfile
    from moeforge.config.model import ModelConfig
    from moeforge.plan.arrangement import Arrangement
    from moeforge.plan.workload import Workload

Precision = Literal["bf16", "bf16_pure", "fp32", "fp64"]
Schedule = Literal["1f1b", "interleaved-1f1b", "zero-bubble", "zbv"]


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A mixture of experts: preset, directory or hub id.")],
    cluster: Annotated[
        str, typer.Option(help="NODESxDEVICES-NAME (192x8-a800, 8x8-h100, 1x2-cpu, ...) or a calibrated TOML file.")
    ],
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    dp: Annotated[
        int | None, typer.Option(min=1, help="Data-parallel replicas; default what the cluster's devices leave.")
    ] = None,
    micro_batch_sequences: Annotated[int, typer.Option(min=1, help="Sequences of a micro-batch.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, metavar="S", help="Tokens of a sequence; default the model's, at most 8192.")
    ] = None,
    batch_sequences: Annotated[
        int | None, typer.Option(min=1, metavar="B", help="Sequences of a step; default about 4 million tokens.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Number format.")] = "bf16",
    overlap_chunks: Annotated[
        int, typer.Option(min=1, help="Pieces that tokens travel to their experts in; 1 = no overlap.")
    ] = 1,
    imbalance: Annotated[
        float, typer.Option(help="Largest over mean number of tokens that a rank's experts get.")
    ] = 1.0,
    schedule: Annotated[Schedule, typer.Option(help="Pipeline schedule.")] = "1f1b",
    json: Json = False,
) -> None:
    """Compare EDP, EP, ETP and their mixtures: what fits, what travels inside and across nodes, what it costs."""
    from moeforge.cli.models import model_config
    from moeforge.config.clusters import load_hardware
    from moeforge.plan.arrangement import Arrangement
    from moeforge.plan.compare import compare_modes, flat
    from moeforge.plan.request import default_batch
    from moeforge.plan.workload import Workload

    hardware, config = load_hardware(cluster), model_config(model)
    if config.moe is None:
        raise UserError(f"{model}: is a dense model; compare needs a mixture of experts")
    chunks = 2 if schedule in ("interleaved-1f1b", "zbv") else 1
    arrangement = Arrangement(
        pp, dp or max(1, hardware.devices // (pp * tp)), tp, tp, 1, schedule, chunks, micro_batch_sequences
    )
    length = sequence_length or min(config.max_positions, 8192)
    together = arrangement.dp * micro_batch_sequences
    work = Workload(
        model=config,
        precision=precision,
        sequence_length=length,
        micro_batch_sequences=micro_batch_sequences,
        batch_sequences=batch_sequences or -(-default_batch(length, hardware) // together) * together,
        dp=arrangement.dp,
        tp=tp,
        overlap_chunks=overlap_chunks,
        imbalance=imbalance,
    )
    _check(hardware, config, arrangement, work, dp is not None)
    result = {
        "model": model,
        "cluster": hardware.name,
        "world_size": hardware.devices,
        **{key: getattr(arrangement, key) for key in ("pp", "dp", "tp", "schedule", "chunks")},
        **{key: getattr(work, key) for key in _STEP},
        "modes": [flat(row) for row in compare_modes(hardware, work, arrangement)],
    }
    emit(result, json, lambda: _human(result))


_STEP = (
    "precision", "sequence_length", "micro_batch_sequences", "micro_batches", "batch_sequences", "overlap_chunks",
    "imbalance",
)  # fmt: skip


def _check(
    hardware: HardwareProfile, config: ModelConfig, arrangement: Arrangement, work: Workload, dp_given: bool
) -> None:
    """Raises UserError for sizes that do not fit one another."""
    from moeforge.layout import require_schedule

    a, devices = arrangement, hardware.devices
    if a.pp * a.dp * a.tp != devices:
        keys = ("pp", "dp", "tp") if dp_given else ("pp", "tp")
        given, fit = ", ".join(f"--{key} {getattr(a, key)}" for key in keys), "be" if dp_given else "divide"
        raise UserError(f"{given}: {' x '.join(keys)} must {fit} the number of devices of {hardware.name} ({devices})")
    if a.pp * a.chunks > config.num_layers:
        raise UserError(
            f"--pp {a.pp}: {a.pp * a.chunks} stages must be at most the model's number of layers ({config.num_layers})"
        )
    if work.sequence_length > config.max_positions:
        raise UserError(
            f"--sequence-length {work.sequence_length}: must be at most the model's positions ({config.max_positions})"
        )
    together = a.dp * a.micro_batch_sequences
    if work.batch_sequences % together:
        raise UserError(
            f"--batch-sequences {work.batch_sequences}: must be a multiple of dp x micro-batch-sequences ({together})"
        )
    if not 1 <= work.imbalance < math.inf:
        raise UserError(f"--imbalance {work.imbalance}: must be a number from 1 on")
    if a.pp == 1 and a.schedule != "1f1b":
        raise UserError(f"--schedule {a.schedule}: needs --pp 2 or more")
    require_schedule(a.schedule, a.pp * a.chunks, a.pp, work.micro_batches)


def _human(result: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = result["modes"]
    table = Table(box=None, pad_edge=False)
    for name in ("", "ep", "etp", "copies", "tokens in", "across", "experts in", "across", "waits s", "peak GB"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("step s", justify="right")
    table.add_column("tokens/s/GPU", justify="right")
    for row in rows:
        sizes = [str(row[key] or "-") for key in ("ep", "etp", "expert_dp")]
        sent = [_gigabytes(row[key]) for key in _SENT]
        figures = [_figure(row[key], digits) for key, digits in _FIGURES]
        table.add_row(_name(row), *sizes, *sent, figures[0], _gigabytes(row["peak_bytes"]), *figures[1:])
    notes = [f"{_name(row)} ep {row['ep']} etp {row['etp']}: {row['reason']}" for row in rows if row["reason"]]
    regions = next((row for row in rows if row["feasible"]), None)
    if regions is not None:
        notes.append(
            f"tensor-parallel regions, in every mode: {_gigabytes(regions['tp_inside_bytes'])} GB inside nodes, "
            f"{_gigabytes(regions['tp_across_bytes'])} across"
        )
    return Group(Text(_facts(result)), "", table, "", Text("\n".join(notes)))


_SENT = ("tokens_inside_bytes", "tokens_across_bytes", "experts_inside_bytes", "experts_across_bytes")
_FIGURES = (("tokens_exposed_seconds", 2), ("step_seconds", 2), ("tokens_per_second_per_gpu", 0))


def _facts(result: dict[str, Any]) -> str:
    return (
        "{model} on {cluster}: pp {pp} x dp {dp} x tp {tp}, {schedule}, {precision}; a step of {batch_sequences} x "
        "{sequence_length} tokens,\n{micro_batches} micro-batches of {micro_batch_sequences} a pipeline, "
        "overlap chunks {overlap_chunks}, imbalance {imbalance:g}\n"
        "GB that a rank sends in a step inside its node and across nodes (mean over stages, without recomputation):\n"
        "tokens to experts and back; gradients and weights of experts with copies. waits: seconds of a step in which\n"
        "tokens travel and nothing is computed. step: the best plan with whole layers"
    ).format(**result)


def _name(row: dict[str, Any]) -> str:
    return "mixed" if row["mode"] == "custom" else row["mode"].upper()


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:,.1f}" if size else "0"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
