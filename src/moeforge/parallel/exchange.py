"""An all-to-all with gradients, in two steps, so that it can travel behind what is computed between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeforge.parallel.group import Group, Pending


class Exchange:
    """`wait(launch(x))` is the all-to-all of rows x with the given splits.

    Autograd runs what was recorded last first. So the backward of `wait`, which starts the exchange that brings the
    gradients back, and that of `launch`, which waits for it, have between them the backward of whatever lies between
    the two forwards: both directions are hidden behind the same kind of work.
    """

    def __init__(self, group: Group, send: list[int], receive: list[int]) -> None:
        self.group, self.send, self.receive = group, send, receive
        self.under_way: Pending | None = None

    def launch(self, x: Tensor) -> Tensor:
        """Start it. The result may only be given to `wait`."""
        out: Tensor = _Launch.apply(x, self)
        return out

    def wait(self, launched: Tensor) -> Tensor:
        """The received rows."""
        out: Tensor = _Wait.apply(launched, self)
        return out

    def start(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Start one direction."""
        self.under_way = self.group.start_all_to_all(x, send, receive)
        return self.under_way.output

    def finish(self) -> Tensor:
        """Wait for the direction that was started last."""
        assert self.under_way is not None
        output = self.under_way.wait()
        self.under_way = None
        return output


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(x, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, launched: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.finish().view_as(launched)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.start(grads[0], exchange.receive, exchange.send)
        return grads[0], None  # has the right shape, and tells autograd to run `_Launch`'s backward
