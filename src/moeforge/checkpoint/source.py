"""What every kind of weight file offers, whatever its format."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeforge.errors import UserError

Shape = tuple[int, ...]


class WeightSource(Protocol):
    """Named tensors on disk, read one at a time. Names are those of the file."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name."""
        ...

    def shape(self, name: str) -> Shape:
        """Its shape, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which `tensor` gives it."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, memory-mapped where the format allows it."""
        ...


def incomplete(path: Path, reason: str) -> UserError:
    """The error for a weight file that is missing or cut short: one line naming the file."""
    return UserError(f"{path}: {reason}: the checkpoint is half-downloaded or damaged; download it again")


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UserError naming the tensor if it holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype == torch.float8_e4m3fn:  # it has no infinity; NaN is all ones but for the sign
        if (tensor.view(torch.uint8) & 0x7F == 0x7F).any():
            raise UserError(f"{name}: the checkpoint holds NaN weights; only finite weights can be used")
        return
    if tensor.element_size() == 1:  # torch has no aminmax of the other 8-bit floats
        tensor = tensor.float()
    low, high = tensor.aminmax()  # passes NaN on, and unlike isfinite takes no memory
    if not (torch.isfinite(low) and torch.isfinite(high)):
        kind = "NaN" if low.isnan() else "infinite"
        raise UserError(f"{name}: the checkpoint holds {kind} weights; only finite weights can be used")
