"""Seam 3: entering and leaving a tensor-parallel region. In one process all of it is the identity.

Outside of such regions a rank has t = ceil(T / ranks) consecutive rows of the micro-batch's T tokens (sequence
parallelism); the last shares are filled up with zero rows, which nothing counts. tokens_T, targets_T and everything
that is decided per routing group are of all T.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import Weight, linear, linear_cross_entropy, rms_norm


class Shard(Protocol):
    """What a rank does at the edges of a region whose weights are split over ranks."""

    def enter(self, x_tD: Tensor) -> Tensor:
        """Into the region: gathers the shares to [T, D]; its backward sums the ranks' gradients and cuts shares."""
        ...

    def leave(self, x_TD: Tensor) -> Tensor:
        """Out of the region: sums the ranks' partial results and cuts shares [t, D]; its backward gathers."""
        ...

    def norm(self, x_TC: Tensor, weight_C: Tensor, eps: float, width: int) -> Tensor:
        """RMSNorm over `width` columns, C of which this rank holds."""
        ...

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of a (possibly vocabulary-split) embedding: [t, D]."""
        ...

    def logits(self, x_tD: Tensor, weight_VD: Weight) -> Tensor:
        """Full logits [T, V]."""
        ...

    def cross_entropy(self, x_tD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        """Sum of the tokens' losses; targets of -100 count nothing."""
        ...

    def gather_tokens(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """[t, n] -> [T, n] for each: what all tokens' routers decided. What every rank then makes of it is the same,
        so backward keeps the own share of the gradient."""
        ...

    def own_kept(self, kept_TK: Tensor | None, experts_tK: Tensor) -> Tensor | None:
        """The own share of `kept_TK`, false for filling rows; None where all assignments travel."""
        ...

    def reduce_statistics(self, x: Tensor) -> Tensor:
        """Sum of router statistics over the ranks that route other sequences of the same global micro-batch."""
        ...


class SingleShard:
    """One process holds everything."""

    def enter(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def leave(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def norm(self, x_TC: Tensor, weight_C: Tensor, eps: float, width: int) -> Tensor:
        return rms_norm(x_TC, weight_C, eps)

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        return F.embedding(tokens_T, weight_VD)

    def logits(self, x_TD: Tensor, weight_VD: Weight) -> Tensor:
        return linear(x_TD, weight_VD)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, targets_T)

    def gather_tokens(self, *columns: Tensor) -> tuple[Tensor, ...]:
        return columns

    def own_kept(self, kept_TK: Tensor | None, experts_tK: Tensor) -> Tensor | None:
        return kept_TK

    def reduce_statistics(self, x: Tensor) -> Tensor:
        return x
