"""Seam 3 in serving: every rank has all tokens and a part of every weight.

Legend: n ranks, T tokens, D hidden, C a rank's columns, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import linear
from moeforge.kernels.linear import Weight
from moeforge.kernels.precision import widen
from moeforge.layout import Layout
from moeforge.model import SingleShard
from moeforge.parallel import Group
from moeforge.partition import Range


class PartialShard(SingleShard, ABC):
    """What a rank does with its part of the weights, whichever way the ranks' parts are then put together.

    All activations are whole on every rank, so entering a region is the identity.
    """

    def __init__(self, rows_V: Range) -> None:
        self.rows_V = rows_V

    @abstractmethod
    def leave(self, x_TD: Tensor) -> Tensor:
        """Sum of the ranks' partial results [T, D]."""

    @abstractmethod
    def total(self, statistic_T1: Tensor) -> Tensor:
        """Sum over the ranks of what each found in its own columns [T, 1]."""

    def norm(self, x_TC: Tensor, weight_C: Tensor, eps: float, width: int) -> Tensor:
        wide = widen(x_TC)
        squares = self.total(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(squares / width + eps)).to(x_TC.dtype) * weight_C

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        begin, end = self.rows_V
        if begin == end:
            return self.leave(weight_VD.new_zeros(len(tokens_T), weight_VD.shape[1]))
        mine = (tokens_T >= begin) & (tokens_T < end)
        return self.leave(F.embedding((tokens_T - begin).where(mine, 0), weight_VD) * mine[:, None])


class ServingShard(PartialShard):
    """`moeforge.model.Shard` of one rank of a tensor-parallel group.

    `ordered`: sums are made in float32 in the order of the ranks, so that their bits do not depend on how many tokens
    are summed together (slower); otherwise in the activations' dtype, in whatever order the library prefers.
    """

    def __init__(self, group: Group, layout: Layout, ordered: bool) -> None:
        super().__init__(layout.ranks[group.index].vocab_rows)
        self.group, self.ordered = group, ordered
        self.all_rows_V = [shard.vocab_rows for shard in layout.ranks]

    def leave(self, x_TD: Tensor) -> Tensor:
        return self.total(x_TD)

    def total(self, statistic_T1: Tensor) -> Tensor:
        if self.group.size == 1:
            return statistic_T1
        if not self.ordered:
            return self.group.all_reduce(statistic_T1)
        return add_in_order(self.group.all_gather(statistic_T1[None])).to(statistic_T1.dtype)

    def logits(self, x_TD: Tensor, weight_VD: Weight) -> Tensor:
        """Full logits [R, V] on every rank. Ranks with fewer rows fill up with zeros on the way."""
        own = linear(x_TD, weight_VD)
        if self.group.size == 1:
            return own
        widest = max(end - begin for begin, end in self.all_rows_V)
        parts = self.group.all_gather(F.pad(own, (0, widest - own.shape[1]))[None])
        return torch.cat([part[:, : end - begin] for part, (begin, end) in zip(parts, self.all_rows_V, strict=True)], 1)

    def cross_entropy(self, x_tD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        return F.cross_entropy(widen(self.logits(x_tD, weight_VD)), targets_T, reduction="sum")


def add_in_order(parts_n: Tensor) -> Tensor:
    """The sum of n tensors of 16 or 32 bits in float32 (of float64 in float64), one after another."""
    wide = widen(parts_n)
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total
