"""Seam 1: where routed tokens travel. Locally they only change order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moeforge.kernels import PreparedExperts, combine, expert_permutation, gather, row_alignment
from moeforge.kernels.backend import use_triton

ExpertFunction = Callable[[Tensor, Tensor], Tensor]
"""(x_RD sorted by local expert, offsets_e int32) -> y_RD"""


class Dispatcher(Protocol):
    """Takes tokens to their experts and brings the weighted results back."""

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
        """Weighted sum of expert outputs [T, D]. Assignments whose `kept_TK` is false travel nowhere.

        Which rank holds which of the `num_experts` may differ from `layer` to layer.
        """
        ...


class LocalDispatcher:
    """All experts live in this process."""

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
        if kept_TK is not None:
            weights_TK = weights_TK.where(kept_TK, 0.0)
        if isinstance(experts, PreparedExperts):
            return experts.routed(x_TD, weights_TK, experts_TK)
        # On GPUs only weight gradients want aligned groups; a decode step's padding would cost more than its rows.
        alignment = 1 if use_triton(x_TD) and not torch.is_grad_enabled() else row_alignment(x_TD.dtype)
        permutation = expert_permutation(experts_TK, num_experts, kept_TK, alignment)
        y_RD = experts(gather(x_TD, permutation), permutation.offsets_E)
        return combine(y_RD, weights_TK, permutation)
