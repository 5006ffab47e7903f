"""Tile sizes of the Triton kernels, measured on this machine's GPU and kept for its user."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from moeforge.errors import UserError
from moeforge.files import write_whole


def check_tunable() -> None:
    """Raises UserError where there is nothing to tune."""
    if not torch.cuda.is_available():
        raise UserError("--tune: needs a GPU, and torch sees none; leave it out")
    if find_spec("triton") is None:
        raise UserError("--tune: needs the package triton; run pip install triton")


def tune_here() -> Path:
    """Measures for a minute or more; returns the file, which the kernels read from then on."""
    from moeforge.kernels.triton.configs import table_path
    from moeforge.kernels.triton.tuning import tune

    device = torch.device("cuda", torch.cuda.current_device())
    path = table_path(torch.cuda.get_device_name(device))
    write_whole(path, json.dumps(tune(device), indent=1) + "\n")
    return path
