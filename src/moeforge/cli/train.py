"""`moeforge train CONFIG.toml`: train a model as its configuration says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.config.schema import TrainConfig


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
    """Train a model, in one process or, under torchrun, in many.

    SIGTERM or Ctrl-C saves and exits with 0 ("interrupted" in the JSON says so); killed at any moment
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
    if plan is not None:
        from moeforge.config.parallel import with_planned_micro_batches
        from moeforge.layout import Layout

        resolved = with_planned_micro_batches(resolved, Layout.read(plan))

    from moeforge.parallel import launch

    try:
        _train(resolved, resume, plan, json)
    finally:
        launch.shut_down()


def _train(config: TrainConfig, resume: str, plan: Path | None, json: bool) -> None:
    from moeforge.cli.progress import TrainingBar
    from moeforge.cli.tables import run_table
    from moeforge.parallel.launch import local_world_size
    from moeforge.parallel.table import mesh_table
    from moeforge.train import finished, prepare, read_result

    console = stderr_console()
    if finished(config, resume):
        result = read_result(Path(config.run.dir))
    else:
        with console.status("reading data and model") as status:
            trainer = prepare(config, resume, plan, lambda tokens: status.update(f"tokenising: {tokens:,} tokens"))
        console.print(run_table(trainer))
        if trainer.mesh.world.size > 1:
            table = mesh_table(trainer.mesh.layout, local_world_size())
            console.print(f"\n{table}\n", highlight=False, soft_wrap=True)
        if trainer.step:
            console.print(f"resuming after step {trainer.step}")
        with TrainingBar(console, "training", config.train.steps, trainer.step) as bar:
            result = trainer.run(bar)
        if trainer.step == config.train.steps:
            trainer.save_final()
    final = result.run_dir / "final"
    emit(
        {**asdict(result), "final": final if final.exists() else None},
        json,
        f"{result.run_dir}: loss {result.final_loss:.4f} after {result.steps} steps; "
        + (f"model in {final}" if final.exists() else f"stopped by {result.interrupted}, run again to go on"),
    )
