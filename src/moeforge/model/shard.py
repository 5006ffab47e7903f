"""Seam 3: entering and leaving a tensor-parallel region. In one process all of it is the identity."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import linear_cross_entropy


class Shard(Protocol):
    """What a rank does at the edges of a region whose weights are split over ranks."""

    def enter(self, x_TD: Tensor) -> Tensor:
        """Into the region: identity, or a gather of sequence shards; its backward reduces."""
        ...

    def leave(self, x_TD: Tensor) -> Tensor:
        """Out of the region: sums the ranks' partial results."""
        ...

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of a (possibly vocabulary-split) embedding: [T, D]."""
        ...

    def logits(self, x_TD: Tensor, weight_VD: Tensor) -> Tensor:
        """Full logits [T, V]."""
        ...

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        """Sum of the tokens' losses; targets of -100 count nothing."""
        ...

    def reduce_statistics(self, x: Tensor) -> Tensor:
        """Sum of router statistics over the ranks that hold other tokens of the same routing groups."""
        ...


class SingleShard:
    """One process holds everything."""

    def enter(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def leave(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        return F.embedding(tokens_T, weight_VD)

    def logits(self, x_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_TD, weight_VD)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, targets_T)

    def reduce_statistics(self, x: Tensor) -> Tensor:
        return x
