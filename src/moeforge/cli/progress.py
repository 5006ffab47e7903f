"""Progress bars on stderr: of a training run, and of work whose amount is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from moeforge.cli.output import stderr_console


class TrainingBar:
    """Shows step, loss, tokens a second, drop rate and alpha of the rows that a trainer reports."""

    def __init__(self, console: Console, title: str, steps: int, done: int = 0) -> None:
        self._console, self._title = console, title
        self._every = max(1, steps // 10)
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, note="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take one row of metrics."""
        note = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s"
        if row["moe"]:
            drop = sum(layer["drop_rate"] for layer in row["moe"]) / len(row["moe"])
            alpha = sum(layer["aux_coef"] for layer in row["moe"]) / len(row["moe"])
            note += f"  drop {drop:.3f}  α {alpha:.4f}"
        self._progress.update(self._task, completed=row["step"], note=note)
        if "eval_loss" in row:
            note += f"  held-out {row['eval_loss']:.4f}"
        # A line that stays at every evaluation; where no bar can be drawn (a log file, CI) more often.
        if "eval_loss" in row or (not self._console.is_terminal and row["step"] % self._every == 0):
            self._console.print(f"{self._title}: step {row['step']}  {note}", soft_wrap=True)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr; yields its update (done, total)."""
    amount: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), amount, TimeRemainingColumn())
    console = stderr_console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except BaseException:
            bar.live.transient = True  # the error's line stands alone
            raise
