"""Training checkpoints: what an exact resume needs, complete or absent, written while training goes on.

run_dir/checkpoints/step-00000100 holds DCP files, in which any layout finds its part, and trainer.json, written last.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moeforge.errors import RunError, UserError, no_room
from moeforge.parallel import Mesh
from moeforge.parallel.parameters import StateEntry
from moeforge.train import dcp

_PREFIX = "step-"
_TRAINER = "trainer.json"
# A rank that dies is noticed at once; one that writes slowly is waited for.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after `step` optimiser steps. `position` is the next global sequence number, `alpha` the
    balance coefficients, `data` the identity of the training data, `config` the resolved configuration, `model` the
    model's (`ModelConfig.to_dict`)."""

    step: int
    position: int
    tokens: int
    alpha: list[float]
    data: str
    config: dict[str, Any]
    model: dict[str, Any]


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """run_dir/checkpoints/step-00000100"""
    return run_dir / "checkpoints" / f"{_PREFIX}{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def load_trainer_state(directory: Path) -> TrainerState:
    """Raises UserError if `directory` is no complete training checkpoint."""
    try:
        found = json.loads((directory / _TRAINER).read_text(encoding="utf-8"))
        del found["layout"]  # of those who wrote it: for the reader's eyes
        return TrainerState(**found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{directory}: not a training checkpoint ({_TRAINER} is missing or damaged); name a directory like "
            f"runs/x/checkpoints/{_PREFIX}00000100"
        ) from error


def load_entries(directory: Path, entries: Iterable[StateEntry], mesh: Mesh) -> None:
    """Fill the entries' tensors in place, whatever layout wrote the checkpoint. All ranks call it.

    Raises UserError on all ranks, naming the file, where one is missing or damaged.
    """
    failure = None
    try:
        dcp.SavedState(directory).read(dcp.boxes_of(entries, lambda tensor: tensor))
    except UserError as error:
        failure = str(error)
    if failures := [text for text in mesh.world.all_gather_object(failure) if text]:
        raise UserError(failures[0])


class Saver:
    """Writes checkpoints in a thread, one at a time, while training goes on. All ranks call the same methods.

    The thread speaks to those of other ranks over a process group of its own, so that its messages cannot come between
    those of a training step. A rank that dies while writing leaves a draft, which the next save removes.
    """

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._group: dist.ProcessGroup | None = None

    def save(self, run_dir: Path, entries: Iterable[StateEntry], state: TrainerState, keep: int, mesh: Mesh) -> Path:
        """Copy what this rank saves and begin to write it; returns where it will be.

        Checkpoints beyond the `keep` newest are deleted when it is there. Raises RunError, naming the last complete
        checkpoint, where this save cannot begin or the one before it has failed.
        """
        self.wait()
        if mesh.world.size > 1 and self._group is None:
            self._group = dist.new_group(timeout=_TIMEOUT, backend="gloo")
        job = _Job(run_dir, state, keep, mesh, self._group)
        with mesh.watchdog.paused():
            self._raise(job.begin() if mesh.rank == 0 else None)
            saved = (entry for entry in entries if entry.saved)
            job.staged = dcp.boxes_of(saved, lambda tensor: tensor.to("cpu", copy=True))
        self._job = job
        job.start()
        return job.final

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed on this rank; `wait` then says why, on all ranks."""
        return self._job is not None and self._job.failure is not None

    def wait(self) -> None:
        """Until the last save is complete. Raises RunError where it has failed, on all ranks."""
        job, self._job = self._job, None
        if job is not None:
            with job.mesh.watchdog.paused():
                job.join()
                if job.failure is not None and job.mesh.rank > 0:  # its thread lost the others: nobody is there to ask
                    raise RunError(job.failure)
                self._raise(job.failure)

    def _raise(self, failure: str | None) -> None:
        """Raise the first rank's failure, if it has one, on all ranks."""
        if self._group is not None:
            shared = [failure]
            dist.broadcast_object_list(shared, 0, self._group)
            failure = shared[0]
        if failure is not None:
            raise RunError(failure)


class _Job(threading.Thread):
    """One checkpoint, from the draft to the directory under its own name."""

    def __init__(
        self, run_dir: Path, state: TrainerState, keep: int, mesh: Mesh, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(name=f"save-{state.step}")
        self.run_dir, self.state, self.keep, self.mesh, self.group = run_dir, state, keep, mesh, group
        self.final = checkpoint_directory(run_dir, state.step)
        self.draft = self.final.with_name(f".{self.final.name}.saving")
        self.staged: dict[str, dcp.Boxes] = {}
        self.failure: str | None = None

    def begin(self) -> str | None:
        """Make the draft's directory, and remove those of killed saves; the failure, if any."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            _remove_drafts(self.final.parent)
            self.draft.mkdir()
        except OSError as error:
            return self._failed(_reason(error))
        return None

    def run(self) -> None:
        written: dcp.Written | str
        try:
            written = dcp.write(self.draft, self.staged, self.mesh.rank)
        except Exception as error:
            written = _reason(error)
        self.staged = {}
        try:
            everyone = self._gather(written)
            if self.mesh.rank == 0:
                self._finish(everyone)
        except Exception as error:
            self.failure = self._failed(_reason(error))

    def _gather(self, written: dcp.Written | str) -> list[dcp.Written | str]:
        if self.group is None:
            return [written]
        everyone: list[Any] | None = [None] * self.mesh.world.size if self.mesh.rank == 0 else None
        dist.gather_object(written, everyone, 0, self.group)
        return everyone or []

    def _finish(self, everyone: list[dcp.Written | str]) -> None:
        for rank, failure in enumerate(everyone):
            if isinstance(failure, str):
                raise RuntimeError(failure if len(everyone) == 1 else f"rank {rank}: {failure}")
        written = [each for each in everyone if not isinstance(each, str)]
        if missing := dcp.missing_files(self.draft, written):
            raise RuntimeError(f"{missing[0]} is on another machine: run.dir must be on a disk that all of them share")
        dcp.write_metadata(self.draft, written)
        manifest = asdict(self.state) | {"layout": asdict(self.mesh.layout)}
        (self.draft / _TRAINER).write_text(json.dumps(manifest), encoding="utf-8")
        _sync(self.draft / _TRAINER)
        _sync(self.draft)
        if self.final.exists():
            _discard(self.final)
        self.draft.rename(self.final)
        _sync(self.final.parent)
        for old in checkpoints(self.run_dir)[: -self.keep]:
            _discard(old)

    def _failed(self, reason: str) -> str:
        """Leave nothing half-written; what went wrong, and what is left."""
        if self.mesh.rank == 0:
            _remove_drafts(self.final.parent)
        done = checkpoints(self.run_dir)
        saved = f"the last complete checkpoint is {done[-1]}" if done else "no checkpoint was saved before"
        return f"{self.final}: cannot save the checkpoint of step {self.state.step} ({reason}); {saved}"


def _reason(error: BaseException) -> str:
    full = no_room(error)
    return f"the disk is full: {full}" if full else (str(error).strip() or type(error).__name__).splitlines()[0]


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
