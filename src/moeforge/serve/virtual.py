"""All ranks of a layout in one process, one after another: what shows that a model's parts make up the whole where
there is one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moeforge.kernels import linear
from moeforge.kernels.precision import widen
from moeforge.layout import Layout
from moeforge.model import AttentionContext, ForwardContext, Transformer
from moeforge.partition import Range
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.shard import PartialShard


class VirtualRanks:
    """The ranks' models, in order, each with the weights of its part (see `load_rank`).

    Every unit is run by each rank on the same input. Partial results add up in the order of the ranks, as an ordered
    `ServingShard` adds them, and the last rank goes on with the sum.
    """

    def __init__(self, ranks: Sequence[Transformer], layout: Layout) -> None:
        assert len(ranks) == layout.tp
        self.ranks, self.config = list(ranks), ranks[0].config
        self._sums = _Sums()
        self._shards = [_VirtualShard(shard.vocab_rows, self._sums) for shard in layout.ranks]
        self._dispatchers = [
            ServingDispatcher(shard, held) for shard, held in zip(self._shards, layout.expert_ranks, strict=True)
        ]

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attentions: Sequence[AttentionContext]) -> Tensor:
        """hidden_TD, as `Transformer.forward`; one attention context a rank, which sees that rank's KV groups."""
        contexts = [
            ForwardContext(attention, dispatcher, shard)
            for attention, dispatcher, shard in zip(attentions, self._dispatchers, self._shards, strict=True)
        ]
        rotary = self.ranks[0].rotary(positions_T)
        x = tokens_T
        for named in zip(*(rank.units() for rank in self.ranks), strict=True):
            units = [unit for _, unit in named]
            self._sums.forget()
            if self.config.qk_norm == "full" and named[0][0].endswith(".attention"):
                # Normalisation wants the sum over all ranks before any of them can go on: found by a first pass,
                # which neither attends nor writes a page.
                self._run(units, x, rotary, [replace(context, attention=_NoAttention()) for context in contexts])
                self._sums.keep_statistics()
            x = self._run(units, x, rotary, contexts)
        return x

    def _run(self, units: Sequence[nn.Module], x: Tensor, rotary: Any, contexts: Sequence[ForwardContext]) -> Tensor:
        out = x
        for unit, context in zip(units, contexts, strict=True):
            self._sums.next_rank()
            out = unit(x, rotary, context)
        return out

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] of the chosen rows of hidden."""
        return torch.cat([linear(hidden_RD, rank.output_weight) for rank in self.ranks], 1)


class _Sums:
    """What the ranks have added so far within one unit: the n-th sum of each rank belongs together."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another unit begins."""
        self._partial: list[Tensor] = []
        self._statistics: list[Tensor] = []
        self._known: list[Tensor] | None = None

    def keep_statistics(self) -> None:
        """All ranks have given their statistics: from now on they are told the sums; the rest begins anew."""
        self._known = self._statistics
        self._partial = []

    def next_rank(self) -> None:
        self._sum = self._statistic = 0

    def leave(self, x: Tensor) -> Tensor:
        total = _add(self._partial, self._sum, x)
        self._sum += 1
        return total.to(x.dtype)

    def total(self, statistic: Tensor) -> Tensor:
        index = self._statistic
        self._statistic += 1
        if self._known is not None:
            return self._known[index]
        return _add(self._statistics, index, statistic)


def _add(totals: list[Tensor], index: int, x: Tensor) -> Tensor:
    if index == len(totals):
        totals.append(widen(x))
    else:
        totals[index] = totals[index] + widen(x)
    return totals[index]


class _VirtualShard(PartialShard):
    def __init__(self, rows_V: Range, sums: _Sums) -> None:
        super().__init__(rows_V)
        self._sums = sums

    def leave(self, x_TD: Tensor) -> Tensor:
        return self._sums.leave(x_TD)

    def total(self, statistic_T1: Tensor) -> Tensor:
        return self._sums.total(statistic_T1)


class _NoAttention:
    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        return q_THh
