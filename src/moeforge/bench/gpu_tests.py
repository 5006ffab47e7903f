"""The tests that need a GPU and nothing but torch and triton, each file in a process of its own, several at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[3]
_FOLDER = Path("tests", "kernels")
_NOT_COLLECTED, _NO_TESTS = 2, 5
"""pytest's exit codes where a file cannot be imported, and where it has no tests of the kind."""


def gpu_tests(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """One case a file of tests."""
    files = sorted((_ROOT / _FOLDER).rglob("test_*.py"))
    missing = None
    if device.type != "cuda":
        missing = "no GPU"
    elif not files:
        missing = "the package is installed without its tests"
    elif find_spec("pytest") is None:
        missing = "pytest is not installed"
    if missing is not None:
        yield "tests", lambda: {"skipped": missing}
    else:
        yield from run_files(files, _ROOT / _FOLDER, "cuda")


def run_files(files: Sequence[Path], folder: Path, marker: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The tests with this marker, all files at once: most of the time goes to compilers on the host.

    Of the conftest files only those from `folder` on are read: the one above it wants more than pytest.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        started = [(path, pool.submit(_run, path, folder, marker)) for path in files]
        for path, future in started:
            yield str(path.relative_to(folder)), future.result


def _run(path: Path, folder: Path, marker: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        marker,
        "-p",
        "no:cacheprovider",
        "--confcutdir",
        str(folder),
    ]
    done = subprocess.run([*command, str(path)], cwd=_ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == _NO_TESTS:
        return {"skipped": f"no {marker} tests"}
    missing = re.search(r"No module named '(\w+)", done.stdout)
    if done.returncode == _NOT_COLLECTED and missing and find_spec(missing[1]) is None:
        return {"skipped": f"{missing[1]} is not installed"}
    if done.returncode:
        return {"error": (done.stdout + done.stderr)[-6000:], "summary": lines[-1] if lines else ""}
    return {"summary": next((line for line in reversed(lines) if " passed" in line), lines[-1])}
