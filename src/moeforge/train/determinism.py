"""`run.deterministic`: a run that gives the same bits again on the same devices, layout and build.

It rests on torch's choice among algorithms (where it has none that repeats, it raises an error that names the
operation), on two libraries that read their settings once in a process, and on our own kernels, which never add
atomically, so that they repeat with or without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moeforge.errors import UserError

_ALLOWED = {
    # cuBLAS: workspaces of a fixed size, or its choice among algorithms depends on what is free (torch insists too).
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL: no sums in the switches (NVLink SHARP), whose order changes from call to call (NVIDIA/nccl#1497).
    "NCCL_NVLS_ENABLE": ("0",),
}


def prepare_libraries() -> None:
    """Set what cuBLAS and NCCL read from the environment when they start: call it before CUDA is used.

    Raises UserError where a variable says otherwise already, or is not set and it is too late for that.
    """
    for name, allowed in _ALLOWED.items():
        given = os.environ.get(name)
        if given is None and not torch.cuda.is_initialized():
            os.environ[name] = allowed[0]
        elif given not in allowed:
            found = "is not set, and this process has used a GPU already" if given is None else f'is "{given}"'
            raise UserError(f"run.deterministic = true: {name} {found}; must be {' or '.join(allowed)} from the start")


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms for the length of a block, where `wanted`."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
