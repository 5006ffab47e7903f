"""What the C heap does with memory that tensors free: process-wide choices (glibc only; elsewhere nothing happens)."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_DEFAULT_MMAP_MAX = 65536


def _mallopt(*settings: tuple[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in settings:
        mallopt(parameter, value)


def keep_freed_memory() -> None:
    """For training on CPU: freed memory stays with the process.

    Otherwise every step's gradients and activations, gigabytes, are given back to the kernel and come back page by
    page as zeros: measured 5 to 10 % of a step. Where the system offers huge pages, torch asks for them. Call it
    before the model is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _mallopt((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """For streaming: every freed tensor of a megabyte or more goes back at once.

    By default glibc raises its limit to the largest block seen and keeps smaller ones, so a process that reads layer
    after layer would slowly hold more than one of them.
    """
    _mallopt((_M_MMAP_MAX, _DEFAULT_MMAP_MAX), (_M_MMAP_THRESHOLD, 1 << 20), (_M_TRIM_THRESHOLD, 1 << 20))
