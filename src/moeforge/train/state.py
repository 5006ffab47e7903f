"""Training checkpoints: a model directory plus what an exact resume needs, complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeforge.checkpoint import Checkpoint, save_model
from moeforge.errors import RunError, UserError, no_room
from moeforge.model import Transformer

_PREFIX = "step-"
_OPTIMIZER = "optimizer.safetensors"
_TRAINER = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after `step` optimiser steps. `position` is the next global sequence number, `alpha` the
    balance coefficients, `data` the identity of the training data, `config` the resolved configuration."""

    step: int
    position: int
    tokens: int
    alpha: list[float]
    data: str
    config: dict[str, Any]


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """run_dir/checkpoints/step-00000100"""
    return run_dir / "checkpoints" / f"{_PREFIX}{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def save_checkpoint(
    run_dir: Path,
    model: Transformer,
    optimizer_state: Iterable[tuple[str, Tensor]],
    state: TrainerState,
    tokenizer_from: Checkpoint,
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, then delete the oldest beyond `keep`.

    Raises RunError naming the last complete checkpoint if the disk is full; nothing half-written is left.
    """
    final = checkpoint_directory(run_dir, state.step)
    draft = final.with_name(f".{final.name}.saving")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_drafts(final.parent)  # of a killed save
        save_model(model, draft, tokenizer_from=tokenizer_from)
        save_file({name: tensor.detach().cpu() for name, tensor in optimizer_state}, draft / _OPTIMIZER)
        (draft / _TRAINER).write_text(json.dumps(asdict(state), indent=2))
        for path in (*draft.iterdir(), draft):
            _sync(path)
        if final.exists():
            _discard(final)
        draft.rename(final)
        _sync(final.parent)
    except Exception as error:  # tokenizers and safetensors raise classes of their own for a full disk
        _remove_drafts(final.parent)
        done = checkpoints(run_dir)
        saved = f"the last complete checkpoint is {done[-1]}" if done else "no checkpoint was saved before"
        full = no_room(error)
        reason = f"the disk is full: {full}" if full else (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"{final}: cannot save the checkpoint of step {state.step} ({reason}); {saved}") from error
    for old in checkpoints(run_dir)[:-keep]:
        _discard(old)
    return final


def _remove_drafts(parent: Path) -> None:
    for draft in parent.glob(".*"):
        shutil.rmtree(draft, ignore_errors=True)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves nothing that looks like one."""
    trash = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(trash)
    shutil.rmtree(trash)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not know it for directories.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def load_trainer_state(directory: Path) -> TrainerState:
    """Raises UserError if `directory` is no complete training checkpoint."""
    try:
        return TrainerState(**json.loads((directory / _TRAINER).read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"--resume {directory}: not a training checkpoint ({_TRAINER} is missing or damaged); name a directory "
            f"like runs/x/checkpoints/{_PREFIX}00000100"
        ) from error


def load_optimizer_state(directory: Path) -> dict[str, Tensor]:
    """Masters and moments by name. Raises UserError for a damaged file."""
    try:
        with safe_open(directory / _OPTIMIZER, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory / _OPTIMIZER}: cannot be read ({error}); resume from another checkpoint"
        ) from error
