"""Held-out loss of a checkpoint whose weights need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from moeforge.checkpoint import Checkpoint
from moeforge.checkpoint.units import Passage, empty_model, loaded_units
from moeforge.data import Batch
from moeforge.evaluate.loss import EvalResult
from moeforge.model import DenseAttention, ForwardContext


@torch.inference_mode()
def streamed_loss(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """`held_out_loss` with one unit in memory, and the hidden states of all batches.

    `progress` is called with (units done, units in all). Raises UserError for weights that are NaN or infinite, and
    where there is no target.
    """
    model, passages, targets = empty_model(checkpoint), [], []
    for batch in batches:
        sequences, positions = batch.tokens.shape
        context = ForwardContext(DenseAttention(sequences, positions, batch.documents))
        batch = batch.to(device)
        passages.append(Passage(model, batch.tokens.flatten(), batch.positions.flatten(), context, dtype))
        targets.append(batch.targets.flatten())
    for done, (_, unit) in enumerate(loaded_units(model, checkpoint, dtype, device), 1):
        for passage in passages:
            passage.through(unit)
        if progress is not None:
            progress(done, len(model.names))
    total, tokens = 0.0, 0
    for passage, targets_T in zip(passages, targets, strict=True):
        total += model.loss(passage.hidden_TD, targets_T, passage.context).item()
        tokens += int((targets_T >= 0).sum())
    return EvalResult.of(total, tokens)
