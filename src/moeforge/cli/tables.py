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

    model = trainer.model
    config = trainer.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    total, active = model.config.parameters(), model.config.parameters(active=True)
    title = (
        f"{total:,} parameters ({active:,} active) in {dtype} on {trainer.device}, precision {config.model.precision}; "
        f"{config.train.batch_sequences} x {config.data.sequence_length} tokens a step"
    )
    table = Table(
        "units", "kind", "parameters each", "active each", "recomputed", title=title, title_justify="left", box=None
    )
    for names, unit, members in unit_runs(describe(model.config)["units"]):
        again = sum(name in model.recompute for name in members)
        table.add_row(
            names,
            unit["kind"],
            f"{unit['params']:,}",
            f"{unit['params_active']:,}",
            f"{again} of {len(members)}" if again else "",
        )
    return table
