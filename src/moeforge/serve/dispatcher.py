"""Seam 1 in serving: every rank holds some columns of all experts, and the ranks' results are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.kernels.linear import TILE_ROWS
from moeforge.layout import ExpertShard
from moeforge.model import LocalDispatcher
from moeforge.model.dispatcher import ExpertFunction
from moeforge.serve.shard import PartialShard


class ServingDispatcher(LocalDispatcher):
    """`moeforge.model.Dispatcher` of one rank, which holds `held`.

    `deterministic`: groups are whole tiles of a deterministic weight's rows.
    """

    def __init__(self, shard: PartialShard, held: ExpertShard, deterministic: bool = False) -> None:
        self.shard, self.held, self.deterministic = shard, held, deterministic

    def alignment(self, x_TD: Tensor, experts_TK: Tensor, num_experts: int) -> int:
        if self.deterministic:
            return TILE_ROWS
        if x_TD.device.type != "cpu":
            return super().alignment(x_TD, experts_TK, num_experts)
        # Prepared weights take few rows as they are; of many, padding costs less than code for each number of rows.
        rows = experts_TK.numel() // num_experts
        return 1 if rows <= 16 else 8 if rows <= 64 else 32

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
