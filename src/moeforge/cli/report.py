"""`moeforge report`: one HTML page about one run, or comparing several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeforge.cli.output import Json, emit


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories (they hold metrics.jsonl).")],
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; default: report.html in the run, or here if there are several."),
    ] = None,
    json: Json = False,
) -> None:
    """Write one self-contained HTML page about a training run, or comparing several."""
    from moeforge.report import write_report

    result = write_report(runs, out)
    emit(
        result,
        json,
        lambda: "\n".join([f"{result['report']} ({result['bytes'] / 1e6:.1f} MB)", *_lines(result["runs"])]),
    )


def _lines(runs: list[dict[str, object]]) -> list[str]:
    return [f"{run['name']}: {note}" for run in runs for note in run["notes"]]  # type: ignore[attr-defined]
