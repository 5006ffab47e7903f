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


@contextmanager
def together() -> Iterator[None]:
    """Run the block on every rank; if it raises on any, raise on all what the lowest failing rank raised.

    For blocks without collectives. A UserError stays one; other ranks' faults become a RunError naming the rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = "" if failure is None else "user" if isinstance(failure, UserError) else "fault"
    reports = _everyone((kind, str(failure)))
    failed = [rank for rank, (found, _) in enumerate(reports) if found]
    if not failed:
        return
    kind, message = reports[failed[0]]
    if failure is not None and (reports.count(reports[failed[0]]) == len(reports) or kind == "fault"):
        raise failure
    where = "" if len(failed) == len(reports) else f"rank {failed[0]}: "
    raise (UserError if kind == "user" else RunError)(f"{where}{message}")


def require_same(what: str, value: str) -> None:
    """Raise UserError on all ranks, naming those that differ from rank 0, unless `value` is the same on all."""
    digests = _everyone(hashlib.sha256(value.encode()).hexdigest())
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"{what}: rank {', '.join(others)} has another than rank 0; start all ranks with the same")
