"""From a training configuration to a finished run: data, model, plan, resume."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from moeforge.checkpoint import Checkpoint, dequantized, load_part, open_checkpoint, pick_device
from moeforge.config.parallel import check_batch, layout_for, with_planned_micro_batches
from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config
from moeforge.data import PackedDataset, TokenCache, build_cache
from moeforge.errors import UserError
from moeforge.files import write_whole
from moeforge.heap import keep_freed_memory
from moeforge.layout import Layout
from moeforge.model import Transformer
from moeforge.parallel import Mesh, launch
from moeforge.parallel.consensus import require_same, together
from moeforge.parallel.parameters import parameter_parts
from moeforge.parallel.pipeline import share_tied
from moeforge.train.determinism import prepare_libraries
from moeforge.train.optimizer import MODEL_DTYPE
from moeforge.train.resume import find_resume, finished
from moeforge.train.trainer import Trainer


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


def _lock(run_dir: Path) -> FileLock:
    """Keeps other processes out of the run's directory for as long as the lock lives.

    A file system that cannot lock is used without.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"run.dir = {run_dir}: another process is training in it and holds {lock.lock_file}; wait, or name another"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return lock


@contextmanager
def _locked(run_dir: Path) -> Iterator[FileLock]:
    """Make and lock the run's directory; if the block fails, what this call made and nobody filled goes again."""
    missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir)
    try:
        yield lock
    except BaseException:
        if missing:
            with suppress(OSError):  # not empty: a cache, another run, something written whole
                (run_dir / ".lock").unlink(missing_ok=True)
                for path in missing:
                    path.rmdir()
        raise


def prepare(
    config: TrainConfig,
    resume: str = "auto",
    plan: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trainer:
    """A trainer at the step that the run stands at, its run directory written; one of many under torchrun.

    `progress` is called with the number of tokens that were tokenised so far. Raises UserError for bad input, on all
    ranks what the first failing one found.
    """
    if config.run.deterministic and config.model.device != "cpu" and torch.cuda.is_available():
        prepare_libraries()
    device = launch.local_device(pick_device(config.model.device, "model.device"))
    if device.type == "cpu":
        keep_freed_memory()
    timeout = config.parallel.hang_timeout_seconds
    launch.initialise(device, timeout)
    watchdog = launch.start_watchdog(timeout)
    require_same("the training configuration", config.model_dump_json())
    first, world_size = launch.world_rank() == 0, launch.world_size()
    run_dir = Path(config.run.dir)
    with _locked(run_dir) if first else nullcontext() as lock:
        with together(), watchdog.paused():
            if finished(config, resume):
                raise UserError(f"run.dir = {run_dir}: another process has just finished this run; its result is there")
            planned = None if plan is None else Layout.read(plan)
            if planned is not None:
                config = with_planned_micro_batches(config, planned)
            resumed = find_resume(config, resume)
            source = dequantized(open_checkpoint(config.model.path))
            _check_positions(config, source)
            layout = _layout(config, source, planned, world_size)
            train_data, held_out = open_data(config, source.tokenizer(), progress)
            if resumed and resumed[1].data != train_data.identity():
                raise UserError(
                    f"data.train: no longer the text that the checkpoint {resumed[0]} was trained on; restore it, or "
                    "start a new run in another run.dir"
                )
        require_same("the plan, the data or the checkpoint to resume", f"{layout} {resumed} {train_data.identity()}")
        mesh = Mesh.create(layout, device, timeout, launch.local_world_size(), watchdog)
        with together(), watchdog.paused():
            chunks = load_chunks(source, mesh, MODEL_DTYPE[config.model.precision], empty=resumed is not None)
            if first:
                if resumed is None:
                    # Without a checkpoint nothing of an earlier, killed attempt can be gone on from.
                    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
                write_whole(run_dir / "config.toml", dump_config(config))
                write_whole(run_dir / "model.json", json.dumps(source.config.to_dict(), indent=2) + "\n")
                layout.write(run_dir / "layout.json")
        trainer = Trainer(config, run_dir, mesh, chunks, source, train_data, held_out, lock)
        if resumed is not None:
            trainer.resume(*resumed)
        return trainer


def _layout(config: TrainConfig, source: Checkpoint, planned: Layout | None, world_size: int) -> Layout:
    if planned is None:
        return layout_for(config, source.config, world_size)
    planned.check(source.config, world_size)
    check_batch(config, planned)
    return planned


def load_chunks(source: Checkpoint, mesh: Mesh, dtype: torch.dtype, empty: bool = False) -> list[Transformer]:
    """This rank's stages of the model with its parts of the weights; `empty`: uninitialised, to be filled otherwise."""
    chunks = []
    for stage in mesh.stages:
        with torch.device("meta"):
            chunk = Transformer(source.config, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank)
        parts = parameter_parts(source.config, mesh.layout, stage, mesh.at.tp, mesh.at.expert_rank)
        if empty:
            state = {name: torch.empty(part.shape, dtype=dtype, device=mesh.device) for name, part in parts.items()}
        else:
            state = load_part(source, parts, dtype, mesh.device)
        chunk.load_state_dict(state, assign=True)
        chunks.append(chunk)
    share_tied(chunks)
    return chunks


def _check_positions(config: TrainConfig, source: Checkpoint) -> None:
    length, limit = config.data.sequence_length, source.config.max_positions
    if length > limit:
        raise UserError(f"data.sequence_length = {length}: {config.model.path} has only {limit} positions")
