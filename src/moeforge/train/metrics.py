"""What a step reports: rows of metrics.jsonl, and TensorBoard."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from moeforge.errors import RunError, no_room
from moeforge.files import write_whole
from moeforge.model import RouterRecord

Row = dict[str, Any]


def router_rows(record: RouterRecord, drop_rate_L: Tensor) -> list[Row]:
    """One row a MoE layer from a step's record; means over the step's routed tokens."""
    totals = record.totals()
    tokens = totals["tokens"].clamp_min(1)
    load = totals["load"] / totals["assignments"].clamp_min(1)[:, None]
    columns = {
        "drop_rate": drop_rate_L,
        "aux_coef": record.alpha,
        "aux_loss": totals["aux"] / tokens,
        "load_max_over_mean": load.max(1).values * record.num_experts,
        "gate_entropy": totals["entropy"] / tokens,
        "max1_over_max2": totals["max1_over_max2"] / tokens,
        "max2_over_max3": totals["max2_over_max3"] / tokens,
        "load": load,
    }
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        {"layer": layer} | {name: column[i] for name, column in values.items()} for i, layer in enumerate(record.layers)
    ]


def distribution_rows(record: RouterRecord) -> list[Row]:
    """Mean sorted gate probabilities of each layer, with and without normalisation (the report's figure 2)."""
    totals = record.totals()
    tokens = totals["tokens"].clamp_min(1)[:, None]
    normed, plain = (totals[name] / tokens for name in ("sorted", "sorted_unnormalised"))
    return [
        {"layer": layer, "sorted_mean": normed[i].tolist(), "sorted_mean_unnormalised": plain[i].tolist()}
        for i, layer in enumerate(record.layers)
    ]


class MetricsLog:
    """metrics.jsonl, opened at the step that a run starts or resumes from: later rows are cut off."""

    def __init__(self, run_dir: Path, step: int, tensorboard: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row["step"] <= step] if step else []
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when this returns. Raises RunError where it cannot be."""
        try:
            self._append(row)
        except OSError as error:
            with suppress(OSError):
                self._file.close()  # or the interpreter tries again, and complains, when it ends
            raise RunError(
                f"{self.path}: cannot be written ({no_room(error) or error.strerror}) at step {row['step']}; started "
                "again, the run goes on from the last checkpoint"
            ) from error

    def _append(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._board is None:
            return
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, row["step"])
        for layer in row.get("moe", []):
            for name in ("drop_rate", "aux_coef", "load_max_over_mean", "expert_similarity"):
                if name in layer:
                    self._board.add_scalar(f"{name}/layer_{layer['layer']:02d}", layer[name], row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl up to the first that is none: a kill may have cut the last one short."""
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
    return rows
