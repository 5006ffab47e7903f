"""Safetensors files: one, or shards with an index. Tensors are views of a memory map of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeforge.checkpoint.source import Shape, first_line, incomplete
from moeforge.errors import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsSource:
    """The `model.safetensors` of a directory, or the shards of its `model.safetensors.index.json`."""

    def __init__(self, directory: Path) -> None:
        self._handles: dict[str, Any] = {}
        for path, expected in weight_files(directory, "model.safetensors").items():
            try:
                handle = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise incomplete(path, f"cannot be read as safetensors ({first_line(error)})") from None
            found = handle.keys()
            if expected is not None and (lost := sorted(expected - set(found))):
                raise incomplete(path, f"lacks {lost[0]}, which the index places there")
            self._handles.update(dict.fromkeys(found, handle))

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self._handles)

    def shape(self, name: str) -> Shape:
        """Its shape, from the header."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype, from the header."""
        return _DTYPES[self._handles[name].get_slice(name).get_dtype()]

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored."""
        return self._handles[name].get_tensor(name)


def weight_files(directory: Path, single: str) -> dict[Path, set[str] | None]:
    """Each weight file of a directory with the names its index places there (None where there is no index).

    `single` is the name of an unsharded file; the index is that name with `.index.json`. Raises UserError for
    an unreadable index or a shard that is not there.
    """
    index = directory / f"{single}.index.json"
    if not index.is_file():
        return {directory / single: None}
    files: dict[Path, set[str] | None] = {}
    try:
        for name, file in json.loads(index.read_text())["weight_map"].items():
            names = files.setdefault(directory / file, set())
            assert names is not None
            names.add(name)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise incomplete(index, "cannot be read as an index of weights") from None
    if missing := [path.name for path in files if not path.is_file()]:
        raise incomplete(directory / missing[0], f"is missing ({len(missing)} of {len(files)} shards are)")
    if not files:
        raise UserError(f"{index}: weight_map is empty: the index must name at least one shard")
    return files
