"""Seam 1 in serving: every rank holds some columns of all experts, and the ranks' results are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.layout import ExpertShard
from moeforge.model import LocalDispatcher
from moeforge.model.dispatcher import ExpertFunction
from moeforge.serve.shard import PartialShard


class ServingDispatcher(LocalDispatcher):
    """`moeforge.model.Dispatcher` of one rank, which holds `held`."""

    def __init__(self, shard: PartialShard, held: ExpertShard) -> None:
        self.shard, self.held = shard, held

    def route(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        kept_TK: Tensor | None,
        num_experts: int,
        experts: ExpertFunction,
    ) -> Tensor:
        begin, end = self.held.columns[layer]
        if begin == end:  # nothing to compute, and the same sum as on the other ranks
            return self.shard.leave(torch.zeros_like(x_TD))
        return self.shard.leave(super().route(layer, x_TD, weights_TK, experts_TK, kept_TK, num_experts, experts))
