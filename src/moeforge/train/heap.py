"""Process-wide memory settings of training on CPU."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let the C heap keep what tensors free, for the rest of the process (glibc only; elsewhere nothing happens).

    Otherwise every step's gradients and activations, gigabytes, are given back to the kernel and come back page by
    page as zeros: measured 5 to 10 % of a step. Where the system offers huge pages, torch asks for them. Call it
    before the model is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
