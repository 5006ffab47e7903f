"""From torchrun's environment to torch.distributed, and back."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from moeforge.errors import UserError
from moeforge.parallel.watchdog import Watchdog

# Longer than what ranks that do the same need one after another.
_FIRST_RANK_FAILS = timedelta(seconds=10)
_watchdog: Watchdog | None = None  # it ends the process, so there is one a process


def world_size() -> int:
    """Processes of this run: torchrun's WORLD_SIZE, 1 without torchrun. Raises UserError for a broken environment."""
    return max(_number("WORLD_SIZE", 1), 1)


def world_rank() -> int:
    """This process's number among them. Raises UserError where it is none of them."""
    rank = _number("RANK", 0)
    if rank >= world_size():
        raise UserError(f'RANK = "{rank}": must be less than WORLD_SIZE ({world_size()})')
    return rank


def local_world_size() -> int:
    """Processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def local_device(device: torch.device) -> torch.device:
    """`device`, or of several processes on a machine each its own GPU, which NCCL asks for.

    "cuda" arrives here as cuda:0. Raises UserError for a GPU that all were to share, and where there are too few.
    """
    if device.type != "cuda" or local_world_size() == 1:
        return device
    local, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if device.index:
        raise UserError(f"model.device = '{device}': must be auto or cuda, for each process takes a GPU of its own")
    if local >= found:
        raise UserError(f"LOCAL_RANK = {local}: must be less than the number of GPUs ({found}); start fewer processes")
    chosen = torch.device("cuda", local)
    torch.cuda.set_device(chosen)
    return chosen


def initialise(device: torch.device, timeout_seconds: float) -> None:
    """Join the other processes, if there are any and this has not been done. Call `shut_down` in the end."""
    if world_size() == 1 or dist.is_initialized():
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE = {world_size()}: {missing[0]} is not set; start the processes with torchrun")
    rank = world_rank()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Later than the watchdog, which can name who is late.
    timeout = timedelta(seconds=2 * timeout_seconds + 60)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun may keep one store through its restarts: the addresses of the former processes must not be found.
    dist.init_process_group(backend, store=_agent_store("ranks"), rank=rank, world_size=world_size(), timeout=timeout)


def start_watchdog(timeout_seconds: float) -> Watchdog:
    """A watchdog that beats in the store that torchrun keeps, through a connection of its own: the process group's may
    be busy waiting. Without torchrun it only notes what is being done. A process has one: the former is stopped."""
    global _watchdog
    _stop_watchdog()
    _watchdog = Watchdog()
    if dist.is_initialized() and "MASTER_ADDR" in os.environ:
        _watchdog.start(_agent_store("watchdog"), world_rank(), world_size(), timeout_seconds)
    return _watchdog


def _agent_store(purpose: str) -> dist.Store:
    """A connection of its own to the store at MASTER_ADDR, under names of this attempt."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=300))
    return dist.PrefixStore(f"moeforge/{attempt}/{purpose}", store)


def speaks_of_failure() -> bool:
    """Whether this rank is to say why it fails. Where all fail alike, the first does; another one only speaks if the
    first does not fail within seconds as well, having met what the others have not."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        store = _agent_store("failure")
        if world_rank() == 0:
            store.set("first", "")
        else:
            store.wait(["first"], _FIRST_RANK_FAILS)
            return False
    except (UserError, KeyError, RuntimeError, dist.DistError):  # no such word from it, or nowhere to leave one
        pass
    return True


def shut_down() -> None:
    """Leave the process group; nothing in a single process. No time-out can be met any more."""
    if dist.is_initialized():
        dist.destroy_process_group()  # which may hang where others are lost: still watched
    _stop_watchdog()


def _stop_watchdog() -> None:
    if _watchdog is not None:
        _watchdog.stop()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f'{name} = "{text}": must be a whole number, as torchrun sets it')
    return int(text)
