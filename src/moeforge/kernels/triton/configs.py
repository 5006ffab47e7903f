"""Tile sizes of the matmul kernels: safe defaults, or what was measured on this very device.

A table of measured ones is JSON, {kind: {rows of a tile: configuration}}, in the file of the device's name: in the
user's cache directory, or else in the package, where only devices that were measured have one. `tuning.tune` makes it.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Kind = Literal["float32", "16-bit", "weight-only", "w8a8", "weight-grad"]
"""By what is multiplied: `weight-only` is e4m3 with 16-bit activations."""

BLOCK_K: dict[str, int] = {"float32": 32, "16-bit": 64, "weight-only": 128, "w8a8": 128}
"""Columns summed at a time: they order a row's sum, so they are never tuned. Divisors of a block of scales."""
_PROGRAMS, _MOST_PARTS, _PART_COLUMNS = 512, 8, 1024
"""Wanted programs of 64 weight rows, parts at most, and columns of a part at least."""
BUCKETS = (16, 32, 64, 128)
"""Rows of an expert, rounded up, by which configurations are chosen."""


class Config(NamedTuple):
    """block_m rows by block_n weight rows a tile; `group_m` row tiles share weights in the cache."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group_m: int = 8


def bucket(rows: int, experts: int) -> int:
    """The smallest bucket that holds an expert's even share of the rows, or the largest."""
    share = -(-rows // max(experts, 1))
    return next((size for size in BUCKETS if share <= size), BUCKETS[-1])


def parts(weight_rows: int, columns: int) -> int:
    """In how many parts the columns of an FP8 weight are summed, so that there are programs for all multiprocessors
    where it has few rows. It orders sums: so it follows from the weight's shape alone."""
    most = min(_PROGRAMS // -(-weight_rows // 64), columns // _PART_COLUMNS)
    return 1 << max(0, min(most, _MOST_PARTS).bit_length() - 1)


def default_config(kind: Kind, rows: int) -> Config:
    """What fits every architecture from sm_80 on; `rows` is a bucket."""
    if kind == "weight-grad":
        return Config(128, 128, 8, 3)
    if kind == "float32":
        return Config(min(rows, 64), 64, 4, 2)
    if rows == 128:
        return Config(128, 128, 8, 2 if kind == "weight-only" else 3)
    return Config(min(rows, 32), 64, 4, 4) if kind != "16-bit" else Config(rows, 64, 4, 4 if rows < 64 else 3)


def config(kind: Kind, rows: int, device: torch.device) -> Config:
    """The measured configuration for a bucket of rows, or the default."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return _table(name).get(kind, {}).get(rows) or default_config(kind, rows)


def table_path(device_name: str) -> Path:
    """Where the user's own table of a device lies: $XDG_CACHE_HOME or ~/.cache, moeforge/kernels."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "moeforge" / "kernels" / _file_name(device_name)


def _file_name(device_name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in device_name.lower()) + ".json"


def _packaged(device_name: str) -> Path:
    return Path(__file__).parent / "measured" / _file_name(device_name)


@cache
def _table(device_name: str) -> dict[str, dict[int, Config]]:
    for place in (table_path, _packaged):
        try:
            path = place(device_name)
            text = path.read_bytes()
        except (RuntimeError, OSError):  # no home directory; no such file, or none that may be read
            continue
        try:
            table = json.loads(text)
            return {k: {int(rows): Config(**c) for rows, c in v.items()} for k, v in table.items()}
        except (ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"{path}: ignored: no table of kernel configurations ({error}); delete it", stacklevel=2)
    return {}
