"""Mean cross-entropy of a model over batches it was not trained on.

Legend: B sequences, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moeforge.data import Batch
from moeforge.errors import UserError
from moeforge.model import DenseAttention, ForwardContext, Transformer


@dataclass(frozen=True)
class EvalResult:
    """`loss` in nats per predicted token, `perplexity` its exponential, `tokens` predicted."""

    loss: float
    perplexity: float
    tokens: int

    @classmethod
    def of(cls, total_loss: float, tokens: int) -> EvalResult:
        """From a sum of cross-entropies. Raises UserError where nothing was predicted."""
        if tokens == 0:
            raise UserError("held-out text: 0 tokens to predict; give a text of at least two tokens")
        loss = total_loss / tokens
        # The largest double is e^709.78; an untrained or broken model may lie beyond.
        return cls(loss, math.exp(loss) if loss < 709 else math.inf, tokens)


@torch.inference_mode()
def held_out_loss(model: Transformer, batches: Iterable[Batch]) -> EvalResult:
    """Sum of the cross-entropies of all targets over their number, however they fall into batches.

    Targets of -100 count nothing. No capacity, no dropped tokens, no router statistics: what inference
    computes. Raises UserError where there is no target at all.
    """
    device = next(model.parameters()).device
    # Sums stay on the device: nothing here makes the host wait for it between batches.
    loss = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        sequences, positions = batch.tokens.shape
        context = ForwardContext(DenseAttention(sequences, positions, batch.documents))  # looks at values: on the host
        batch = batch.to(device)
        hidden = model(batch.tokens.flatten(), batch.positions.flatten(), context)
        loss += model.loss(hidden, batch.targets.flatten(), context)
        tokens += (batch.targets >= 0).sum()
    return EvalResult.of(loss.item(), int(tokens.item()))
