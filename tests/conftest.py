"""What every test shares: no network, one hypothesis profile, no spinning threads, no GPU tests where there is no GPU,
and ranks as forked processes under gloo: `run_ranks(world_size, function, *args)`."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

RunRanks = Callable[..., list[Any]]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other sleep: spinning, on cores that others use too, takes seconds where work takes none.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

settings.register_profile("moeforge", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("moeforge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _child(rank: int, world_size: int, directory: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # first: a forked child hangs in the parent's OpenMP threads
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        store = dist.FileStore(str(directory / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        result = function(rank, *args)
        torch.save(result, directory / f"{rank}.part")
        (directory / f"{rank}.part").rename(directory / f"{rank}.result")
        dist.barrier()
    except BaseException:
        (directory / f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


@pytest.fixture
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """Calls `function(rank, *args)` in `world_size` processes that share a gloo group; returns what they returned.

    Results travel as files; a rank that raises ends the test with its traceback, and the others at once.
    """

    import torch

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        directory = tmp_path_factory.mktemp("ranks")
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=_child, args=(rank, world_size, directory, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            if any(p.exitcode for p in ranks):
                break
            time.sleep(0.01)
        late = [rank for rank, p in enumerate(ranks) if p.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        errors = [f"rank {path.stem}:\n{path.read_text()}" for path in sorted(directory.glob("*.error"))]
        assert not errors, "\n".join(errors)
        done = [directory / f"{rank}.result" for rank in range(world_size)]
        missing = [path.stem for path in done if not path.exists()]
        assert not missing, f"ranks {', '.join(missing)} gave no result within {timeout:.0f} s; still running: {late}"
        return [torch.load(path, weights_only=False) for path in done]

    return run
