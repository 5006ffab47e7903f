"""What a run has come to, read from its metrics."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from moeforge.train.metrics import read_rows


@dataclass(frozen=True)
class TrainResult:
    """Losses in nats a token: `final_loss` the last step's training loss, the others held out (None: not evaluated).
    `tokens_per_second` is the median step's; `interrupted` names the signal that ended the run early."""

    run_dir: Path
    steps: int
    tokens: int
    final_loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    tokens_per_second: float
    interrupted: str | None = None


def read_result(run_dir: Path) -> TrainResult:
    """The result of the run so far, whichever processes made it."""
    rows = read_rows(run_dir / "metrics.jsonl")
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    last = rows[-1] if rows else {"step": 0, "tokens": 0}
    return TrainResult(
        run_dir,
        last["step"],
        last["tokens"],
        last.get("loss", math.nan),
        evaluated[0] if evaluated and rows[0]["step"] == 0 else None,
        evaluated[-1] if evaluated else None,
        statistics.median(speeds) if speeds else math.nan,
    )
