from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, torch
from moeforge.heap import keep_freed_memory, return_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for choice in ("keep", "return", "default"):
    if os.fork() == 0:
        if choice != "default":
            keep_freed_memory()
        if choice == "return":
            return_freed_memory()
        before = resident()
        x = torch.ones(64 * 2**20 // 4)
        del x
        print(resident() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_stays_or_goes_as_asked() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True, text=True)
    kept, given_back, default = map(int, done.stdout.split())
    assert kept > 60 * 2**20 > 30 * 2**20 > max(given_back, default)
