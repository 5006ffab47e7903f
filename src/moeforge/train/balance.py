"""Balance control: drop rates and the adaptive coefficients of the auxiliary loss (SKYWORK section 2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moeforge.model.router import capacity

Scope = Literal["group", "global"]


def drop_rate(totals: dict[str, Tensor], scope: Scope, capacity_factor: float) -> Tensor:
    """Share of assignments beyond capacity, one a layer [L], over one optimiser step.

    "group" sums the overflow of every routing group; "global" pools the step's load as one group. Without dropping
    this is the virtual rate: what capacity would have dropped.
    """
    assignments = totals["assignments"]
    if scope == "group":
        overflow = totals["overflow"]
    else:
        load = totals["load"]
        limit = capacity(assignments, load.shape[1], capacity_factor)
        overflow = (load - limit[:, None]).clamp_min(0).sum(1)
    return overflow / assignments.clamp_min(1)


class AdaptiveCoefficients:
    """One auxiliary-loss coefficient alpha a layer, driven by its drop rate d (equations 7 to 9).

    f(d) = min(xi d, alpha_max); alpha <- beta alpha + (1 - beta) f(d), once per optimiser step, from alpha_max.
    Not `adaptive`: alpha stays at alpha_max. Float64, so that resuming is exact.
    """

    def __init__(
        self, layers: int, alpha_max: float, xi: float, beta: float, adaptive: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.alpha_max, self.xi, self.beta, self.adaptive = alpha_max, xi, beta, adaptive
        self.alpha = torch.full((layers,), alpha_max, dtype=torch.float64, device=device)

    def update(self, drop_rate_L: Tensor) -> None:
        """Take one optimiser step's drop rates [L]."""
        if self.adaptive:
            target = (self.xi * drop_rate_L).clamp_max(self.alpha_max)
            self.alpha = self.beta * self.alpha + (1 - self.beta) * target

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return self.alpha.tolist()

    def load(self, state: list[float]) -> None:
        """The inverse of `state`."""
        self.alpha = torch.tensor(state, dtype=torch.float64, device=self.alpha.device)
