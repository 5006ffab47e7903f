"""Tables that more than one verb shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.cli.inspect import describe, unit_runs

if TYPE_CHECKING:
    from rich.table import Table

    from moeforge.train import Trainer


def run_table(trainer: Trainer) -> Table:
    """Parameters by unit and where they live: what a run prints before its first step."""
    from rich.table import Table

    model, config = trainer.model_config, trainer.config
    dtype, device = str(trainer.dtype).removeprefix("torch."), trainer.mesh.device
    total, active = model.parameters(), model.parameters(active=True)
    recomputed = {name for stage in trainer.mesh.layout.stages for name in stage.recompute}
    title = (
        f"{total:,} parameters ({active:,} active) in {dtype} on {device}, precision {config.model.precision}; "
        f"{config.train.batch_sequences} x {config.data.sequence_length} tokens a step"
    )
    table = Table(
        "units", "kind", "parameters each", "active each", "recomputed", title=title, title_justify="left", box=None
    )
    for names, unit, members in unit_runs(describe(model)["units"]):
        again = sum(name in recomputed for name in members)
        table.add_row(
            names,
            unit["kind"],
            f"{unit['params']:,}",
            f"{unit['params_active']:,}",
            f"{again} of {len(members)}" if again else "",
        )
    return table
