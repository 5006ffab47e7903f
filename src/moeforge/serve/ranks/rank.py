"""A rank: its place among the others, its device, and the group that it sums with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moeforge.checkpoint import pick_device
from moeforge.config.serving import EngineConfig
from moeforge.errors import RunError, UserError
from moeforge.layout import Layout
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.step import StepBatch

# Between ranks that do the same. A dead rank is noticed at once, so this ends only what hangs.
_TIMEOUT = timedelta(minutes=30)
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class Rank:
    """Number `index` of `size`. `group` holds all of them.

    `least(n)` gives every rank the smallest n of any; all must call it.
    """

    index: int
    size: int
    device: torch.device
    group: Group
    least: Callable[[int], int]


class RankRunner(Protocol):
    """One rank's model and pages."""

    @property
    def num_blocks(self) -> int:
        """Pages of the KV cache, equal on all ranks."""
        ...

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, V] of the sequences that sample. All ranks are given the same batches in the same order."""
        ...


MakeRunner = Callable[[EngineConfig, str, Layout, Rank], RankRunner]
"""(settings, model, layout, rank) -> that rank's runner; a function at the top level of a module."""


def rank_device(choice: str, index: int, size: int) -> torch.device:
    """The device of a rank, ready for use: the chosen one, or of many ranks each its own GPU.

    Raises UserError for a GPU that all were to share, and where there are too few.
    """
    device = pick_device(choice)
    if device.type != "cuda" or size == 1:
        return device
    if choice not in ("auto", "cuda"):
        raise UserError(f"device = {choice!r}: must be auto, cuda or cpu, for each of {size} ranks takes its own GPU")
    found = torch.cuda.device_count()
    if size > found:
        raise UserError(f"tensor_parallel_size = {size}: must be at most {found}, the number of GPUs; or device = cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.empty(1, device=device)  # a GPU that cannot be used is found before others wait for this rank
    return device


def join(index: int, size: int, device: torch.device, store: Path) -> Group:
    """The group of all ranks, which meet at the file `store`; one rank needs none. Undone by `leave`.

    They reach each other over loopback alone.
    """
    if size > 1:
        if dist.is_initialized():
            raise RunError("this process has a torch.distributed group already: serving on many ranks needs its own")
        on_gpu = device.type == "cuda"
        with _environment(_LOOPBACK):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.FileStore(str(store), size),
                rank=index,
                world_size=size,
                timeout=_TIMEOUT,
                device_id=device if on_gpu else None,  # connects now, while the environment says where
            )
    return Group("tp", tuple(range(size)), index, dist.group.WORLD if size > 1 else None, Traffic(size), Watchdog())


def leave(group: Group) -> None:
    """Ends what `join` made."""
    if group.process_group is not None:
        dist.destroy_process_group()


def abort(group: Group) -> None:
    """Wake whoever waits for ranks that are gone: gloo notices by itself, NCCL does not."""
    if group.process_group is not None and dist.get_backend(group.process_group) == "nccl":
        group.process_group.abort()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
