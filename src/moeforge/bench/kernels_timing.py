"""Timing of kernels: those that are compared take turns, and what a device copies and multiplies at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from moeforge.bench.clock import Clock

Call = Callable[[], object]
SideCall = TypeVar("SideCall", bound=Call)
Seconds = Mapping[str, list[float]]
_PAUSE_CYCLES = 10_000_000


def in_turn(sides: Mapping[str, Call], rounds: int, device: torch.device | None = None) -> dict[str, list[float]]:
    """Seconds of one call of each side, once a round, after a round of warm-up; every second round backwards.

    A GPU pauses before each call, a few milliseconds, in which the host queues the launches: what is timed is the
    device's work, not the host's.
    """
    clock = Clock(device or torch.device("cpu"))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            clock.wait()
            if clock.device.type == "cuda":
                torch.cuda._sleep(_PAUSE_CYCLES)
            begin = clock.mark()
            sides[name]()
            end = clock.mark()
            clock.wait()
            if index:
                found[name].append(clock.seconds(begin, end))
    return found


def that_run(sides: Mapping[str, SideCall], own: str) -> tuple[dict[str, SideCall], dict[str, str]]:
    """The sides that this device can run, and of the others what they said. Ours has to run."""
    able, failed = {own: sides[own]}, {}
    for name, call in sides.items():
        try:
            call()
            able[name] = call
        except (RuntimeError, ValueError, TypeError) as error:
            if name == own:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    return able, failed


def ratio(found: Seconds, slower: str, faster: str) -> float | None:
    """How many times as long one side takes: the median over rounds; None where one of them was not measured."""
    if slower not in found or faster not in found:
        return None
    return statistics.median(a / b for a, b in zip(found[slower], found[faster], strict=True))


def copy_bandwidth(device: torch.device, buffer_bytes: int = 2**31, rounds: int = 7) -> float:
    """Bytes a second that a copy reads and writes, at best."""
    x = torch.ones(buffer_bytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * buffer_bytes / min(in_turn({"copy": lambda: y.copy_(x)}, rounds, device)["copy"])


def dense_ceiling(device: torch.device, sides: tuple[int, ...] = (4096, 8192), rounds: int = 7) -> float:
    """FLOP/s of the best square bf16 matmul, the median over rounds; of random numbers, for zeros draw less power."""
    best = 0.0
    for n in sides:
        x, w = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        seconds = in_turn({"mm": lambda x=x, w=w: x @ w.t()}, rounds, device)["mm"]  # type: ignore[misc]
        best = max(best, 2 * n**3 / statistics.median(seconds))
    return best
