"""Held-out loss of a checkpoint whose weights need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from moeforge.checkpoint import Checkpoint
from moeforge.checkpoint.units import Passage, empty_model, loaded_units
from moeforge.data import Batch
from moeforge.evaluate.loss import EvalResult
from moeforge.model import DenseAttention, ForwardContext

_HIDDEN_BYTES = 1 << 30
"""Of hidden states that are held at once; longer texts take several walks through the weights."""


@torch.inference_mode()
def streamed_loss(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """`held_out_loss` with one unit in memory, and hidden states of at most 1 GiB, or of one batch.

    `progress` is called with (units done, units in all), over all walks. Raises UserError for weights that are
    NaN or infinite, and where there is no target.
    """
    groups = _groups(batches, _HIDDEN_BYTES // (checkpoint.config.hidden_size * dtype.itemsize))
    total, tokens = 0.0, 0
    for walk, group in enumerate(groups):
        model, passages = empty_model(checkpoint), []
        for batch in group:
            sequences, positions = batch.tokens.shape
            context = ForwardContext(DenseAttention(sequences, positions, batch.documents))
            there = batch.to(device)
            passages.append(Passage(model, there.tokens.flatten(), there.positions.flatten(), context, dtype))
        units = len(model.names)
        for done, (_, unit) in enumerate(loaded_units(model, checkpoint, dtype, device), walk * units + 1):
            for passage in passages:
                passage.through(unit)
            if progress is not None:
                progress(done, len(groups) * units)
        for passage, batch in zip(passages, group, strict=True):
            total += model.loss(passage.hidden_TD, batch.targets.flatten().to(device), passage.context).item()
            tokens += int((batch.targets >= 0).sum())
    return EvalResult.of(total, tokens)


def _groups(batches: Iterable[Batch], tokens: int) -> list[list[Batch]]:
    """Batches in order, so many that they have at most `tokens`, or one."""
    groups: list[list[Batch]] = []
    left = 0
    for batch in batches:
        if not groups or batch.tokens.numel() > left:
            groups.append([])
            left = tokens
        groups[-1].append(batch)
        left -= batch.tokens.numel()
    return groups
