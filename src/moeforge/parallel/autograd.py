"""Collectives with gradients. Each one's backward is the collective that carries gradients the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.parallel.group import Group


class GatherRows(torch.autograd.Function):
    """[t, ...] -> [size * t, ...]; gradients are partial on every rank, so backward sums them as it cuts them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grads[0]), None


class ScatterSum(torch.autograd.Function):
    """Partial sums [size * t, ...] -> [t, ...] of their total; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_gather(grads[0]), None


class GatherSame(torch.autograd.Function):
    """[t, ...] -> [size * t, ...] for what every rank then computes alike: backward keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        begin = ctx.group.index * ctx.rows
        return grads[0][begin : begin + ctx.rows], None


class SumOver(torch.autograd.Function):
    """Sum over the ranks; each rank uses the sum in its own way, so backward sums the gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(grads[0].clone()), None
