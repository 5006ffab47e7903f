"""What fails on one rank fails on all: nobody waits for a rank that has given up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moeforge.errors import RunError, UserError


def _everyone(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _report(failure: Exception | None) -> tuple[str, str]:
    """Kind and message, to be understood on other ranks."""
    if failure is None:
        return "", ""
    if isinstance(failure, UserError | RunError):
        return ("user" if isinstance(failure, UserError) else "run"), str(failure)
    return "fault", f"{type(failure).__name__}: {failure}"


@contextmanager
def together() -> Iterator[None]:
    """Run the block on every rank; if it raises on any, raise on all what the lowest failing rank raised.

    For blocks without collectives. UserError and RunError stay what they are, another fault becomes a RunError on ranks
    that have none of their own; the message names the rank unless all failed alike.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = _everyone(_report(failure))
    first = next((rank for rank, (kind, _) in enumerate(reports) if kind), None)
    if first is None:
        return
    kind, message = reports[first]
    if failure is not None and (kind == "fault" or len(set(reports)) == 1):
        raise failure
    raise (UserError if kind == "user" else RunError)(f"rank {first}: {message}") from failure


def require_same(what: str, value: str) -> None:
    """Raise UserError on all ranks, naming those that differ from rank 0, unless `value` is the same on all."""
    digests = _everyone(hashlib.sha256(value.encode()).hexdigest())
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"{what}: rank {', '.join(others)} has another than rank 0; start all ranks with the same")
