"""Reading a run directory: config.toml, model.json and metrics.jsonl as arrays.

Legend: R rows of metrics (steps), L MoE layers, E experts.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeforge.config.model import ModelConfig
from moeforge.errors import UserError

Array = NDArray[np.float64]

SCALARS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "eval_loss")
LAYER_KEYS = (
    "drop_rate",
    "aux_coef",
    "aux_loss",
    "load_max_over_mean",
    "gate_entropy",
    "max1_over_max2",
    "max2_over_max3",
    "expert_similarity",
)
LOAD_ROWS = 20
"""The expert load at the end is the mean of at most this many last rows: one step alone is noisy."""


@dataclass(frozen=True)
class GateDistribution:
    """Mean gate probabilities of one layer, sorted per token from the largest down; both [E]."""

    layer: int
    normalised: Array
    unnormalised: Array | None


@dataclass(frozen=True)
class Recording:
    """The gate distributions of all layers that were written at one step."""

    step: int
    layers: dict[int, GateDistribution]


@dataclass(frozen=True)
class Run:
    """One training run. Numbers that a row lacks are NaN.

    `scalars` maps SCALARS to [R]; `by_layer` maps LAYER_KEYS to [R, L]; `load` is [L, E], the mean over the
    last `load_rows` rows; `layers` are the indices of the MoE layers, empty in a dense run.
    """

    path: Path
    name: str
    scalars: dict[str, Array]
    layers: tuple[int, ...]
    by_layer: dict[str, Array]
    load: Array | None
    load_rows: int
    gates: tuple[Recording, ...]
    config_text: str | None
    model: ModelConfig | None
    notes: tuple[str, ...]

    def __getitem__(self, key: str) -> Array:
        """A scalar series [R]."""
        return self.scalars[key]

    @property
    def steps(self) -> int:
        """The last step that was trained."""
        return int(np.nanmax(self["step"]))


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    A line that is no JSON object is skipped with a note (the last one is cut short when a run is killed, or
    still being written). Rows of the same step are merged, the later one wins.

    Raises:
        UserError: no such directory, no metrics.jsonl in it, or no row in that.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"report: {path} is not a directory; give the directory of a training run")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"report: {path} holds no metrics.jsonl; give the directory of a training run")
    notes: list[str] = []
    steps: dict[int, dict[str, float]] = {}
    layer_rows: dict[int, tuple[list[int], Array]] = {}
    loads: deque[dict[int, list[float]]] = deque(maxlen=LOAD_ROWS)
    gates: list[Recording] = []
    for row in _rows(file, notes):
        step = int(row["step"])
        scalars = {key: _number(row.get(key)) for key in SCALARS if key in row}
        steps[step] = {**steps.get(step, {}), **scalars}
        entries = row.get("moe") or []
        if entries:
            ids = [int(entry.get("layer", i)) for i, entry in enumerate(entries)]
            values = [[_number(entry.get(key)) for key in LAYER_KEYS] for entry in entries]
            layer_rows[step] = (ids, np.array(values, dtype=np.float32))
            loads.append({i: entry["load"] for i, entry in zip(ids, entries, strict=True) if entry.get("load")})
        if row.get("gate_distribution"):
            gates[1:] = [_recording(step, row["gate_distribution"])]  # the first and the latest
    if not steps:
        raise UserError(f"report: {file} holds no row yet; train at least one step")
    order = sorted(steps)
    diverged = [step for step in order if not math.isfinite(steps[step].get("loss", 0.0))]
    if diverged:
        notes.append(f"The loss is not a finite number at {len(diverged)} step(s), first at step {diverged[0]}.")
    layers = tuple(sorted({i for ids, _ in layer_rows.values() for i in ids}))
    load, load_rows = _mean_load(loads, layers)
    return Run(
        path=path,
        name=path.resolve().name,
        scalars={k: np.array([steps[s].get(k, np.nan) for s in order]) for k in SCALARS},
        layers=layers,
        by_layer=_assemble(order, layers, layer_rows),
        load=load,
        load_rows=load_rows,
        gates=tuple(gates),
        config_text=_read(path / "config.toml", notes),
        model=_model(path / "model.json", notes),
        notes=tuple(notes),
    )


def load_runs(paths: list[Path]) -> list[Run]:
    """Read several runs; runs of the same directory name are told apart by their parents' names."""
    import dataclasses

    runs = [load_run(path) for path in paths]
    for depth in range(2, 12):
        names = [run.name for run in runs]
        if len(set(names)) == len(names):
            break
        runs = [
            dataclasses.replace(run, name="/".join(run.path.resolve().parts[-depth:]))
            if names.count(run.name) > 1
            else run
            for run in runs
        ]
    return runs


def _rows(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    bad: list[int] = []
    number = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, TypeError, KeyError):
                bad.append(number)
                continue
            yield row
    if bad and bad[-1] == number:
        notes.append(f"The last line of metrics.jsonl (line {bad.pop()}) is incomplete and was ignored.")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        notes.append(f"{len(bad)} unreadable line(s) of metrics.jsonl were ignored: {shown}.")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _recording(step: int, entries: list[dict[str, Any]]) -> Recording:
    layers = {}
    for entry in entries:
        plain = entry.get("sorted_mean_unnormalised")
        layers[int(entry["layer"])] = GateDistribution(
            int(entry["layer"]),
            np.array(entry["sorted_mean"], dtype=np.float64),
            np.array(plain, dtype=np.float64) if plain else None,
        )
    return Recording(step, layers)


def _assemble(order: list[int], layers: tuple[int, ...], rows: dict[int, tuple[list[int], Array]]) -> dict[str, Array]:
    column = {layer: i for i, layer in enumerate(layers)}
    table = np.full((len(order), len(layers), len(LAYER_KEYS)), np.nan)
    for i, step in enumerate(order):
        if step in rows:
            ids, values = rows[step]
            table[i, [column[layer] for layer in ids]] = values
    return {key: table[:, :, i] for i, key in enumerate(LAYER_KEYS)}


def _mean_load(loads: deque[dict[int, list[float]]], layers: tuple[int, ...]) -> tuple[Array | None, int]:
    rows = [row for row in loads if set(row) == set(layers)]
    if not rows:
        return None, 0
    return np.mean([[row[layer] for layer in layers] for row in rows], axis=0), len(rows)


def _read(file: Path, notes: list[str]) -> str | None:
    if not file.is_file():
        notes.append(f"{file.name} is missing.")
        return None
    return file.read_text(encoding="utf-8", errors="replace")


def _model(file: Path, notes: list[str]) -> ModelConfig | None:
    text = _read(file, notes)
    try:
        return ModelConfig.from_dict(json.loads(text)) if text is not None else None
    except (ValueError, TypeError, KeyError, AttributeError, UserError):
        notes.append(f"{file.name} could not be read.")
        return None
