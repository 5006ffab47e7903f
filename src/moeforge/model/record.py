"""The record of router statistics of one optimiser step. The caller owns it; forward only assigns to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

AuxLoss = Literal["skywork", "switch", "sequence", "global", "none"]

# Columns after the E expert loads, the E mean gate probabilities and (if asked) the two E sorted distributions.
SCALARS = ("tokens", "assignments", "overflow", "aux", "entropy", "max1_over_max2", "max2_over_max3")


class RouterRecord:
    """Sums over tokens by [MoE layer, micro-batch]: recomputing a micro-batch assigns the same values again.

    `alpha` [L_moe] holds the auxiliary-loss coefficients in force; `routed_tokens` is the number of valid tokens of
    the whole optimiser step (all micro-batches and ranks), by which auxiliary losses are weighted.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        num_experts: int,
        micro_batches: int,
        alpha: Tensor,
        routed_tokens: int,
        aux_loss: AuxLoss = "skywork",
        distributions: bool = False,
    ) -> None:
        self.layers, self.num_experts = layers, num_experts
        self.alpha, self.routed_tokens = alpha, routed_tokens
        self.aux_loss: AuxLoss = aux_loss
        self.distributions = distributions
        self._slot = {layer: i for i, layer in enumerate(layers)}
        width = num_experts * (4 if distributions else 2) + len(SCALARS)
        self.values = torch.zeros(len(layers), micro_batches, width, dtype=torch.float64, device=alpha.device)

    def alpha_of(self, layer: int) -> Tensor:
        """The layer's auxiliary-loss coefficient, a scalar tensor."""
        return self.alpha[self._slot[layer]]

    def assign(self, layer: int, micro_batch: int, scalars: dict[str, Tensor], *per_expert: Tensor) -> None:
        """Write the sums of one micro-batch: the SCALARS, then the per-expert vectors [E] in column order."""
        row = torch.cat([torch.stack([scalars[name].double() for name in SCALARS]), *per_expert])
        self.values[self._slot[layer], micro_batch] = row

    def load_before(self, layer: int, micro_batch: int) -> Tensor:
        """Assignments per expert [E] summed over the earlier micro-batches of this step."""
        start = len(SCALARS)
        return self.values[self._slot[layer], :micro_batch, start : start + self.num_experts].sum(0)

    def reduce(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Keep only the sums over micro-batches and, by `over_ranks`, over the ranks that recorded other tokens or
        other layers."""
        self.values = over_ranks(self.values.sum(1, keepdim=True))

    def totals(self) -> dict[str, Tensor]:
        """Sums over micro-batches: each scalar [L_moe]; `load`, `probability` (and distributions) [L_moe, E]."""
        total = self.values.sum(1)
        result = {name: total[:, i] for i, name in enumerate(SCALARS)}
        names = ("load", "probability", "sorted", "sorted_unnormalised")
        vectors = total[:, len(SCALARS) :].unflatten(1, (-1, self.num_experts))
        return result | {name: vectors[:, i] for i, name in zip(range(vectors.shape[1]), names, strict=False)}
