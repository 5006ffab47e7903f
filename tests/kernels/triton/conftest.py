"""How Triton kernels are tested.

A test that takes `device` runs twice: on the CPU under Triton's interpreter, which must be chosen before triton is
imported and so in a process of its own (`test_interpreter.py` starts it; by hand: TRITON_INTERPRET=1 pytest FILE),
and, marked `cuda`, on a GPU. All others, cross-compilation among them, run in the ordinary process.
The interpreter's dot is wrong for bfloat16: `DTYPES` has it on GPUs only.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        takes_device = "device" in getattr(item, "fixturenames", ())
        if takes_device and not INTERPRETED:
            item.add_marker(pytest.mark.cuda)
        if INTERPRETED and not takes_device:
            item.add_marker(pytest.mark.skip(reason="not for the interpreter"))


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
