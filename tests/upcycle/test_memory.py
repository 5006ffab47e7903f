"""The sampled peak sees memory that is gone again at the end."""

from __future__ import annotations

import mmap
import sys
import time

import pytest

from moeforge.upcycle.memory import PeakAnonymous, anonymous_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_peak_outlives_the_allocation() -> None:
    size = 200 * 2**20
    before = anonymous_bytes()
    with PeakAnonymous() as memory:
        # Pages of its own: the allocator may have kept that much of earlier tests.
        block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        time.sleep(0.1)
        block.close()
        time.sleep(0.05)
    after = anonymous_bytes()
    assert before is not None and after is not None and memory.peak_bytes is not None
    assert memory.peak_bytes - before > 0.95 * size
    assert after - before < 0.5 * size
