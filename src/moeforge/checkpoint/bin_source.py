"""`pytorch_model.bin`: torch's archives, one or in shards with an index. Only weights are ever unpickled."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from moeforge.checkpoint.safetensors_source import weight_files
from moeforge.checkpoint.source import Shape, first_line, incomplete
from moeforge.errors import UserError


class BinSource:
    """The `pytorch_model.bin` of a directory, or the shards of its index; memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path, expected in weight_files(directory, "pytorch_model.bin").items():
            found = _load(path)
            if expected is not None and (lost := sorted(expected - set(found))):
                raise incomplete(path, f"lacks {lost[0]}, which the index places there")
            self._tensors.update(found)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """Its shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, a view of the file."""
        return self._tensors[name]


def _load(path: Path) -> dict[str, Tensor]:
    # Archives older than torch 1.6 are not zip files and cannot be mapped; they are read whole.
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings(action="ignore"):  # about old pickles: either they can be read or not
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not a weights-only checkpoint (it pickles other Python objects, or is no checkpoint): "
            "refused, since reading it would run its code; convert it to safetensors where it comes from"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise incomplete(path, f"cannot be read as a torch archive ({first_line(error)})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: must hold a mapping from names to tensors, and nothing else")
    return state
