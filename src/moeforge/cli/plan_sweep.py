"""`moeforge plan sweep`: one model on clusters of 8 to 16,384 devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError


def sweep(
    model: Annotated[str, typer.Argument(help="Preset, model directory or hub id.")],
    device: Annotated[str, typer.Option(help="Device preset (a800, h100, ...) or a calibrated TOML file.")] = "h100",
    first: Annotated[int, typer.Option("--from", min=1, help="Devices of the smallest cluster.")] = 8,
    last: Annotated[int, typer.Option("--to", min=1, help="Devices of the largest; sizes double.")] = 16384,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in `plan train`; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw tokens/s, MFU, bubble and memory here (.svg or .png).")] = None,
    json: Json = False,
) -> None:
    """The best plan at every size, planned and uniform: tokens/s a device, MFU, bubble, memory.

    A step has 4 million tokens, or 8,192 a device where that is more; --set train.batch_sequences=N fixes it.
    """
    from moeforge.cli.plan_train import read_request, said_keys
    from moeforge.config.clusters import DEVICES, load_hardware
    from moeforge.plan.request import default_batch, request_of
    from moeforge.plan.sweep import sizes
    from moeforge.plan.sweep import sweep as rows_of

    if last < first:
        raise UserError(f"--to {last}: must be at least --from ({first})")
    hardware = DEVICES[device] if device in DEVICES else load_hardware(device)
    node = hardware.devices_per_node
    if odd := [size for size in sizes(first, last) if size > node and size % node]:
        raise UserError(f"--from {first}: gives {odd[0]} devices, no multiple of the node's {node}; use --from {node}")
    if out is not None:
        from moeforge.report.save import picture_format, require_directory

        picture_format(out)
        require_directory(out)
    run, config = read_request(model, settings or [], hardware)
    said = said_keys(settings)
    request = request_of(run, config, said)
    given = model.endswith(".toml") or "train.batch_sequences" in said
    length = run.data.sequence_length

    def batch(cluster: Any) -> int:
        return run.train.batch_sequences if given else default_batch(length, cluster)

    console = stderr_console()
    with console.status("planning") as status:
        rows = list(
            rows_of(hardware, request.work, sizes(first, last), batch, request.fixed, lambda now: status.update(now))
        )
    if out is not None:
        from moeforge.report.sweep import draw_sweep

        draw_sweep(rows, out)
    result = {"model": model, "device": device, "rows": rows, "out": None if out is None else str(out)}
    emit(result, json, lambda: _table(rows))


def _table(rows: list[dict[str, Any]]) -> Any:
    from moeforge.cli.plan_tables import table

    made = table("devices", "batch", "tokens/s/GPU", "uniform", "MFU", "bubble", "peak GB", "pp/dp/tp", "ep/etp")
    for row in rows:
        if row["arrangement"] is None:
            made.add_row(f"{row['devices']:,}", f"{row['batch_sequences']:,}", "does not fit")
            continue
        even = row["uniform_tokens_per_second_per_gpu"]
        made.add_row(
            f"{row['devices']:,}",
            f"{row['batch_sequences']:,}",
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            "does not fit" if even is None else f"{even:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['bubble_fraction']:.1%}",
            f"{row['peak_memory_bytes'] / 1e9:.1f}",
            "{pp}/{dp}/{tp}".format(**row["sizes"]),
            "{ep}/{etp}".format(**row["sizes"]),
        )
    return made
