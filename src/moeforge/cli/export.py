"""`moeforge export CHECKPOINT OUT`: a training checkpoint as a model directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.output import Json, emit
from moeforge.errors import UserError


def command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A training checkpoint: RUN/checkpoints/step-00000100.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model directory to write.")],
    to: Annotated[str, typer.Option(help="hf: a Hugging Face directory (config.json, safetensors, tokenizer).")] = "hf",
    tokenizer_from: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer it gets; default: that of the model the run began with."),
    ] = None,
    json: Json = False,
) -> None:
    """Gather a training checkpoint, however many processes wrote it, into a model that every other verb opens."""
    if to != "hf":
        raise UserError(f"--to {to}: must be hf")
    from moeforge.train.export import export_checkpoint

    started = time.perf_counter()
    config, dtype = export_checkpoint(checkpoint, out, tokenizer_from)
    result = {
        "path": out,
        "params_total": config.parameters(),
        "params_active": config.parameters(active=True),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
    }
    emit(result, json, f"{out}: {config.parameters() / 1e6:,.1f} M parameters, {result['dtype']}")
