"""`moeforge train CONFIG.toml`: train a model as its configuration says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError


def command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The training file; --init writes one to begin with.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as optimizer.lr=3e-4; may be repeated."),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the run's newest checkpoint; never; or a checkpoint directory.")
    ] = "auto",
    plan: Annotated[Path | None, typer.Option(help="A layout written by `moeforge plan train --out`.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Print a commented configuration and stop.")] = False,
    json: Json = False,
) -> None:
    """Train a model. SIGTERM or Ctrl-C saves and exits with 0 ("interrupted" in the JSON says so); killed at any moment
    and started again, it goes on and gives the same losses.
    """
    if init:
        from moeforge.config.template import commented_template

        print(commented_template(), end="")
        return
    if config is None:
        raise UserError("CONFIG.toml: missing; `moeforge train --init > config.toml` writes one to begin with")

    from moeforge.config.toml import load_config

    resolved = load_config(config, settings or [])

    from moeforge.cli.progress import TrainingBar
    from moeforge.cli.tables import run_table
    from moeforge.train import finished, prepare, read_result

    console = stderr_console()
    if finished(resolved, resume):
        result = read_result(Path(resolved.run.dir))
    else:
        with console.status("reading data and model") as status:
            trainer = prepare(resolved, resume, plan, lambda tokens: status.update(f"tokenising: {tokens:,} tokens"))
        console.print(run_table(trainer))
        if trainer.step:
            console.print(f"resuming after step {trainer.step}")
        with TrainingBar(console, "training", resolved.train.steps, trainer.step) as bar:
            result = trainer.run(bar)
        if trainer.step == resolved.train.steps:
            trainer.save_final()
    final = result.run_dir / "final"
    emit(
        {**asdict(result), "final": final if final.exists() else None},
        json,
        f"{result.run_dir}: loss {result.final_loss:.4f} after {result.steps} steps; "
        + (f"model in {final}" if final.exists() else f"stopped by {result.interrupted}, run again to go on"),
    )
