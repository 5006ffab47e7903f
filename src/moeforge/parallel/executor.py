"""Running micro-batches through a rank's stages: forward and backward of all of them, summed losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeforge.model import ForwardContext, Transformer


@dataclass(frozen=True)
class MicroBatch:
    """Flat int64 tensors [T] on the device, the context of their forward pass, and `scale`: the loss is the summed
    cross-entropy times scale."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    context: ForwardContext
    scale: float


class Executor(Protocol):
    """Runs micro-batches; every rank is given the same number of them, of equal shapes."""

    def train(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of all; the sum of the losses that this rank computed (float64; 0 without the head)."""
        ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """The sum alone, without gradients."""
        ...


class Accumulation:
    """All stages on this rank: one micro-batch after another, gradients add up."""

    def __init__(self, chunks: Sequence[Transformer], device: torch.device) -> None:
        self.chunks, self.device = chunks, device

    def train(self, batches: Sequence[MicroBatch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            loss = self._loss(batch)
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self._loss(batch)
        return total

    def _loss(self, batch: MicroBatch) -> Tensor:
        hidden = None
        for chunk in self.chunks:
            hidden = chunk(batch.tokens_T, batch.positions_T, batch.context, hidden)
        assert hidden is not None
        return self.chunks[-1].loss(hidden, batch.targets_T, batch.context) * batch.scale
