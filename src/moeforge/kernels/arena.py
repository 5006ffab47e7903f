"""Memory in huge pages, for weights that are read whole again and again (Linux; elsewhere ordinary memory).

A processor remembers where a few thousand pages lie. Of 4 KiB they cover megabytes, and reading gigabytes of weights
waits for the tables as much as for the memory: measured 1.2 times the bandwidth with pages of 2 MiB, of which small
weights share one.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

_CHUNK = 64 << 20  # bytes of address space; memory is taken where it is touched
_ALIGNMENT = 64  # bytes: a line of the cache, and a vector


class _Arena:
    """Hands out parts of chunks, one after another. A chunk is held by its parts alone, and freed with the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[mmap.mmap] | None = None
        self._used = 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor [count], uninitialised."""
        size = count * dtype.itemsize
        if size > _CHUNK // 4:
            return torch.frombuffer(_mapped(size), dtype=dtype)
        with self._lock:
            chunk = None if self._chunk is None else self._chunk()
            if chunk is None or self._used + size > len(chunk):
                chunk, self._used = _mapped(_CHUNK), 0
                self._chunk = weakref.ref(chunk)
            part = torch.frombuffer(chunk, dtype=dtype, count=count, offset=self._used)
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_arena = _Arena()


def long_lived(count: int, dtype: torch.dtype) -> Tensor:
    """A tensor [count] of at least one number, uninitialised, for what is held as long as a model is."""
    return _arena.take(count, dtype) if hasattr(mmap, "MADV_HUGEPAGE") else torch.empty(count, dtype=dtype)
