from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, ctypes, torch
from moeforge.heap import keep_freed_memory, return_freed_memory
if sys.argv[1] != "default":
    keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
x = torch.ones(64 * 2**20 // 4)
del x
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_stays_or_goes_as_asked() -> None:
    kept, given_back, default = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, check=True, text=True).stdout)
        for choice in ("keep", "return", "default")
    )
    assert kept > 60 * 2**20 > 30 * 2**20 > max(given_back, default)
