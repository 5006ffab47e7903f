"""Recomputing a unit's activations in the backward pass, at the same point on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _Anchor(torch.autograd.Function):
    """Identity that saves its input for backward.

    Recomputation starts when backward first asks for a saved tensor of the unit, and stops when it has made the last
    one. Both would fall between different collectives on ranks that hold different parts of a layer (or none). As the
    unit's last operation this one is asked first and made last: all ranks recompute the whole unit, before its
    backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.saved_tensors  # noqa: B018 (asking is what starts the recomputation)
        return grads[0]


def recomputed(unit: nn.Module, x: Tensor | None, *rest: object) -> Tensor:
    """`unit(x, *rest)`, of which only x is kept."""
    result: Tensor = checkpoint(
        lambda *inputs: _Anchor.apply(unit(*inputs)), x, *rest, use_reentrant=False, preserve_rng_state=False
    )
    return result
