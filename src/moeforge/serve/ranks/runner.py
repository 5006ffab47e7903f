"""The runner of all ranks, in the process of rank 0."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moeforge.config.serving import EngineConfig
from moeforge.errors import RunError, UserError
from moeforge.layout import Layout
from moeforge.parallel import Group
from moeforge.serve.ranks.process import WorkerProcess
from moeforge.serve.ranks.rank import MakeRunner, Rank, RankRunner, abort, join, leave, rank_device
from moeforge.serve.ranks.setup import Setup, name_of
from moeforge.serve.step import StepBatch

# When an operation with the others breaks off: how long until the thread that follows the culprit has heard of its end.
_HEAR_SECONDS = 2.0
_END_SECONDS = 5.0


class TensorParallelRunner:
    """Runs every batch on all ranks of `layout` in lock-step: rank 0 here, the others in processes of their own.

    With one rank there are no other processes. `make_runner` makes each rank's runner. Rank 0 alone decides what runs;
    the others get every batch as plain integers through a pipe, and wait in it, however long.

    A rank that fails or dies takes all others with it: `failed` says why, `on_failure` is called with the same (once,
    in whichever thread notices; not the place to call `close`), and a forward pass under way raises RunError.

    Raises UserError for devices that are not there, and what `make_runner` raises on any rank.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: str,
        layout: Layout,
        make_runner: MakeRunner,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self.failed: str | None = None
        self._error: Exception | None = None
        self._on_failure: Callable[[str], None] | None = None  # until then, the constructor raises
        self._news = threading.Condition()
        self._closing = False
        self._workers: list[WorkerProcess] = []
        self._group: Group | None = None
        self._directory: Path | None = None
        self._threads_before: int | None = None
        try:
            with self._in_lock_step():
                self._runner = self._start(config, model, layout, make_runner)
            with self._news:
                if self._error is not None:
                    raise self._error
                self._on_failure = on_failure
        except BaseException:
            self.close()
            raise
        self.num_blocks = self._runner.num_blocks

    def _start(self, config: EngineConfig, model: str, layout: Layout, make_runner: MakeRunner) -> RankRunner:
        size = layout.world_size
        self.device = device = rank_device(config.device, 0, size)
        store = Path()
        if size > 1:
            self._directory = Path(tempfile.mkdtemp(prefix="moeforge-"))  # for this user alone
            store = self._directory / "store"
            self._threads_before = torch.get_num_threads()
            threads = max(len(os.sched_getaffinity(0)) // size, 1)
            torch.set_num_threads(threads)
            for index in range(1, size):
                setup = Setup(index, config, model, layout, name_of(make_runner), store, threads)
                worker = WorkerProcess(setup, self._heard, self._ended)
                with self._news:
                    self._workers.append(worker)
                    if self._error is not None:  # which the others died of, before this one was there
                        worker.kill()
            self._hear()  # all are ready to meet: whoever waits for them cannot be interrupted
        self._group = join(0, size, device, store)
        runner = make_runner(config, model, layout, Rank(0, size, device, self._group, self._least))
        blocks = {runner.num_blocks, *self._hear()}
        if len(blocks) > 1:
            raise RunError(f"the ranks' KV caches have {sorted(blocks)} blocks: they must be equal")
        return runner

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, V] of the sequences that sample. Raises RunError where a rank has failed."""
        with self._in_lock_step():
            if self._workers:
                numbers = batch.encode()
                for worker in self._workers:
                    worker.send(numbers)
            return self._runner.forward(batch)

    def close(self) -> None:
        """End the other processes, those that hang too. Nothing the second time."""
        with self._news:
            self._closing = True
        for worker in self._workers:
            worker.release()
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            worker.join(max(deadline - time.monotonic(), 0.0))
        if self._group is not None:
            leave(self._group)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
        self._workers, self._group, self._directory, self._threads_before = [], None, None, None

    def _least(self, number: int) -> int:
        least = min([number, *self._hear()])
        for worker in self._workers:
            worker.send([least])
        return least

    def _hear(self) -> list[int]:
        """The next value of every worker, in order."""
        with self._news:
            self._news.wait_for(lambda: self._error is not None or all(worker.values for worker in self._workers))
            if self._error is not None:
                raise self._error
            return [worker.values.popleft() for worker in self._workers]

    def _heard(self) -> None:
        with self._news:
            self._news.notify_all()

    def _ended(self, error: Exception) -> None:
        """A worker failed or ended, or rank 0 can no longer keep step: so do all."""
        with self._news:
            if self._closing or self._error is not None:
                return
            self._error, self.failed = error, str(error)
            for worker in self._workers:
                worker.kill()  # so that whoever waits for them is woken
            self._news.notify_all()
        if self._group is not None:
            abort(self._group)
        if self._on_failure is not None:
            self._on_failure(str(error))

    @contextmanager
    def _in_lock_step(self) -> Iterator[None]:
        """What is done with the other ranks: if it breaks off, it is told whose fault that is, and nothing goes on."""
        if self._error is not None:
            raise RunError(self._error)
        try:
            yield
        except BaseException as error:
            if not self._workers or error is self._error:
                raise
            if type(error) is RuntimeError or isinstance(error, torch.distributed.DistError):
                with self._news:  # so does an operation whose partner is gone
                    self._news.wait_for(lambda: self._error is not None, _HEAR_SECONDS)
            culprit = self._error
            self._ended(RunError(f"rank 0: {type(error).__name__}: {error}"))
            if culprit is not None and isinstance(error, Exception) and not isinstance(error, UserError):
                raise culprit from error
            raise
