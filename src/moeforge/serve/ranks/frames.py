"""Lists of integers through a pipe: a count, then so many, 64 bits each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import BinaryIO

_BYTES = 8


def to_frame(numbers: Sequence[int]) -> bytes:
    """What `read_frame` reads."""
    return array("q", [len(numbers), *numbers]).tobytes()


def read_frame(pipe: BinaryIO) -> list[int] | None:
    """The next list; None where the other side is gone."""
    header = pipe.read(_BYTES)
    if len(header) < _BYTES:
        return None
    size = array("q", header)[0] * _BYTES
    body = pipe.read(size)
    return array("q", body).tolist() if len(body) == size else None
