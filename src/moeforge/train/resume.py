"""Whether a run can go on, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeforge.config.schema import TrainConfig
from moeforge.config.toml import load_config
from moeforge.errors import UserError
from moeforge.train.state import TrainerState, checkpoint_directory, checkpoints, load_trainer_state

# What may differ between a checkpoint's configuration and the one that resumes it, since none of it changes a loss;
# and what of that may not.
_FREE = ("run.", "checkpoint.", "eval.", "data.cache_dir", "model.device", "model.recompute", "parallel.")
_FIXED = ("run.seed", "run.deterministic")


def finished(config: TrainConfig, resume: str = "auto") -> bool:
    """Whether the run's directory holds this very run, trained to its end.

    Raises UserError if it holds another finished run, or if this one was asked to start or resume elsewhere.
    """
    run_dir = Path(config.run.dir)
    if not (run_dir / "final" / "config.json").is_file():
        return False
    if resume != "auto":
        raise UserError(f"run.dir = {run_dir}: holds a finished run; name another directory")
    try:
        other = load_config(run_dir / "config.toml")
    except UserError as error:
        raise UserError(
            f"run.dir = {run_dir}: its config.toml cannot be read ({error}); name another run.dir"
        ) from error
    _require_same(config, other.model_dump(mode="json"), f"the finished run in {run_dir}")
    return True


def find_resume(config: TrainConfig, resume: str) -> tuple[Path, TrainerState] | None:
    """The checkpoint to go on from: "auto" the run's newest if any, "never" none, else the directory named.

    Raises UserError if its configuration differs in a key that changes the training, or if the run has gone further.
    """
    run_dir = Path(config.run.dir)
    existing = checkpoints(run_dir)
    if resume == "never":
        if existing or (run_dir / "metrics.jsonl").exists():
            raise UserError(f"run.dir = {run_dir}: holds a run already; name another directory, or use --resume auto")
        return None
    if resume == "auto" and not existing:
        return None
    found = existing[-1] if resume == "auto" else Path(resume)
    state = load_trainer_state(found)
    if existing and existing[-1].name > checkpoint_directory(run_dir, state.step).name:
        raise UserError(
            f"--resume {found}: run.dir = {run_dir} holds the later {existing[-1].name}, which would be lost; name "
            "another run.dir, or remove the later checkpoints"
        )
    _require_same(config, state.config, f"the checkpoint {found}")
    return found, state


def _require_same(config: TrainConfig, other: dict[str, Any], whose: str) -> None:
    mine, theirs = _flat(config.model_dump(mode="json")), _flat(other)
    for key in sorted(mine.keys() | theirs.keys()):
        changes_training = not key.startswith(_FREE) or key in _FIXED
        if changes_training and mine.get(key) != theirs.get(key):
            raise UserError(
                f"{key} = {mine.get(key)}: {whose} was trained with {theirs.get(key)}; set it back, or start a new run "
                "in another run.dir"
            )


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        return {prefix[:-1]: data}
    return {key: value for name, child in items for key, value in _flat(child, f"{prefix}{name}.").items()}
