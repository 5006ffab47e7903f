"""From a training configuration to a finished run: data, model, plan, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeforge.checkpoint import Checkpoint, load_model, open_checkpoint, pick_device
from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config
from moeforge.data import PackedDataset, TokenCache, build_cache
from moeforge.errors import UserError
from moeforge.files import write_whole
from moeforge.layout import Layout
from moeforge.train.heap import keep_freed_memory
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.state import TrainerState, checkpoints, load_trainer_state
from moeforge.train.trainer import Trainer

# What may differ between a checkpoint's configuration and the one that resumes it: none of it changes a loss.
_FREE = ("run.", "checkpoint.", "eval.", "data.cache_dir", "model.device", "model.recompute")


def open_data(
    config: TrainConfig, tokenizer: Any, progress: Callable[[int], None] | None = None
) -> tuple[PackedDataset, PackedDataset | None]:
    """Training data and held-out data (None if there is none), tokenised into the cache where needed."""
    data, seed = config.data, config.run.seed

    def caches(sources: Any, fraction: float) -> list[TokenCache]:
        return build_cache(sources, tokenizer, data.cache_dir, holdout_fraction=fraction, seed=seed, progress=progress)

    train = caches(data.train, 0.0 if data.eval else data.holdout_fraction)
    held_out = caches(data.eval, 1.0) if data.eval else train
    length = data.sequence_length
    return (
        PackedDataset(train, length, seed),
        PackedDataset(held_out, length, 0, split="held_out") if data.eval or data.holdout_fraction else None,
    )


def find_resume(config: TrainConfig, resume: str) -> tuple[Path, TrainerState] | None:
    """The checkpoint to go on from: "auto" the run's newest if any, "never" none, else the directory named.

    Raises UserError if its configuration differs in a key that changes the training.
    """
    run_dir = Path(config.run.dir)
    if resume == "never":
        if checkpoints(run_dir) or (run_dir / "metrics.jsonl").exists():
            raise UserError(f"run.dir = {run_dir}: holds a run already; name another directory, or use --resume auto")
        return None
    found = checkpoints(run_dir)[-1:] if resume == "auto" else [Path(resume)]
    if not found:
        return None
    state = load_trainer_state(found[0])
    mine, theirs = _flat(config.model_dump(mode="json")), _flat(state.config)
    for key in sorted(mine.keys() | theirs.keys()):
        changes_training = not key.startswith(_FREE) or key == "run.seed"
        if changes_training and mine.get(key) != theirs.get(key):
            raise UserError(
                f"{key} = {mine.get(key)}: the checkpoint {found[0]} was trained with {theirs.get(key)}; "
                "set it back, or start a new run in another run.dir"
            )
    return found[0], state


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        return {prefix[:-1]: data}
    return {key: value for name, child in items for key, value in _flat(child, f"{prefix}{name}.").items()}


def prepare(
    config: TrainConfig,
    resume: str = "auto",
    plan: Path | None = None,
    data: tuple[PackedDataset, PackedDataset | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trainer:
    """A trainer at the step that the run stands at, its run directory written.

    `data` replaces the corpora of the configuration by open datasets. Raises UserError for bad input.
    """
    device = pick_device(config.model.device, "model.device")
    if device.type == "cpu":
        keep_freed_memory()
    resumed = find_resume(config, resume)
    source = open_checkpoint(config.model.path)
    _check_positions(config, source)
    layout = Layout.single(source.config, config.model.recompute)
    if plan is not None:
        layout = Layout.read(plan)
        layout.check(source.config, world_size=1)
    train_data, held_out = data or open_data(config, source.tokenizer(), progress)
    started_from = open_checkpoint(resumed[0]) if resumed else source
    model = load_model(started_from, MODEL_DTYPE[config.model.precision], device, layout)
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if resumed is None:
        # Without a checkpoint nothing of an earlier, killed attempt can be gone on from.
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    write_whole(run_dir / "config.toml", dump_config(config))
    write_whole(run_dir / "model.json", json.dumps(source.config.to_dict(), indent=2) + "\n")
    layout.write(run_dir / "layout.json")
    return Trainer(config, run_dir, model, source, train_data, held_out, resumed)


def _check_positions(config: TrainConfig, source: Checkpoint) -> None:
    length, limit = config.data.sequence_length, source.config.max_positions
    if length > limit:
        raise UserError(f"data.sequence_length = {length}: {config.model.path} has only {limit} positions")
