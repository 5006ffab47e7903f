"""An FP8 checkpoint read as if it were none: for training and upcycling."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moeforge.checkpoint.fp8_scales import INPUT_SCALE, WEIGHT_SCALE, row_scales
from moeforge.checkpoint.names import EMBED
from moeforge.checkpoint.opened import Checkpoint
from moeforge.checkpoint.source import Shape
from moeforge.kernels.fp8_weight import Fp8Weight, dequantize


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or, of one with FP8 weights, the same weights in the dtype of its embedding."""
    if checkpoint.config.quantization is None:
        return checkpoint
    config = dataclasses.replace(checkpoint.config, quantization=None)
    return Checkpoint(checkpoint.path, config, _Dequantized(checkpoint))


class _Dequantized:
    """Weights by canonical name, dequantised when they are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.config.quantization is not None
        self._checkpoint, self._scales = checkpoint, checkpoint.config.quantization.scales
        self._dtype = checkpoint.dtype(EMBED)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name but those of scales."""
        return tuple(name for name in self._checkpoint.names if not name.endswith((WEIGHT_SCALE, INPUT_SCALE)))

    def shape(self, name: str) -> Shape:
        """Its shape."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype once dequantised."""
        return self._dtype if self._scale(name) else self._checkpoint.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """The weight."""
        stored = self._checkpoint.tensor(name)
        if not (scale := self._scale(name)):
            return stored
        by_row = row_scales(self._checkpoint.tensor(scale), stored.shape[0], self._scales)
        return dequantize(Fp8Weight(stored, by_row), self._dtype)

    def _scale(self, name: str) -> str | None:
        scale = name.removesuffix(".weight") + WEIGHT_SCALE
        return scale if scale in self._checkpoint.names else None
