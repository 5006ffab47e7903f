"""A process group with the few collectives that training uses; of one rank, it does nothing.

Sizes are checked here: where they do not fit, gloo aborts the process instead of raising.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moeforge.parallel.traffic import Traffic
from moeforge.parallel.watchdog import Watchdog

# Their names from torch 2.13 on; the old ones warn there.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """An all-to-all under way; `output` is valid after `wait`. It holds on to what is being sent until then."""

    def __init__(self, output: Tensor, work: Any, source: Tensor | None, watchdog: Watchdog, name: str) -> None:
        self.output, self._work, self._source = output, work, source
        self._watchdog, self._name = watchdog, name

    def wait(self) -> Tensor:
        """The received rows; on a GPU the current stream waits, not the host."""
        if self._work is not None:
            with self._watchdog.doing(self._name):
                self._work.wait()
            self._work = self._source = None
        return self.output


class Group:
    """Ranks that communicate: `ranks` are world ranks in order, `index` the own place among them.

    All ranks of a group call the same methods in the same order with tensors of equal type.
    """

    def __init__(
        self,
        name: str,
        ranks: tuple[int, ...],
        rank: int,
        process_group: dist.ProcessGroup | None,
        traffic: Traffic,
        watchdog: Watchdog,
    ) -> None:
        self.name, self.ranks, self.process_group = name, ranks, process_group
        self.index, self.size, self.rank = ranks.index(rank), len(ranks), rank
        self.traffic, self.watchdog = traffic, watchdog

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place; the same bits on every rank."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def maximum_(self, x: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.size > 1 and x.numel():
            part = -(-x.numel() // self.size) * x.element_size()
            self._count("all_reduce", [2 * part] * self.size)
            whole = x if x.is_contiguous() else x.contiguous()
            with self._doing("all_reduce"):
                dist.all_reduce(whole, operation, group=self.process_group)
            if whole is not x:
                x.copy_(whole)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] of every rank -> [size * n, ...]; n must be equal everywhere."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if x.numel():
            self._count("all_gather", [x.numel() * x.element_size()] * self.size)
            with self._doing("all_gather"):
                _ALL_GATHER(_wire(out), _wire(x.contiguous()), group=self.process_group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """[size * n, ...] -> [n, ...], this rank's part of the sum over the ranks."""
        if self.size == 1:
            return x
        if x.shape[0] % self.size:
            raise ValueError(f"{self.name}: {x.shape[0]} rows do not divide by {self.size} ranks")
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        if x.numel():
            self._count("reduce_scatter", [out.numel() * x.element_size()] * self.size)
            with self._doing("reduce_scatter"):
                _REDUCE_SCATTER(out, x.contiguous(), group=self.process_group)
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows x[R, ...], `send[i]` of them to the i-th rank, in order; `receive[i]` come from it."""
        return self.start_all_to_all(x, send, receive).wait()

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """`all_to_all` that goes on behind what is computed next, until `Pending.wait`."""
        fits = len(send) == len(receive) == self.size and sum(send) == x.shape[0] and min(*send, *receive) >= 0
        if not fits or send[self.index] != receive[self.index]:
            raise ValueError(
                f"{self.name}: splits {list(send)} and {list(receive)} do not fit {x.shape[0]} rows on rank "
                f"{self.index} of {self.size}"
            )
        if self.size == 1:
            return Pending(x, None, x, self.watchdog, "all_to_all")
        row = x[:1].numel() * x.element_size()
        self._count("all_to_all", [rows * row for rows in send])
        out = x.new_empty(sum(receive), *x.shape[1:])
        source = x.contiguous()
        with self._doing("all_to_all"):
            work = dist.all_to_all_single(
                _wire(out), _wire(source), list(receive), list(send), group=self.process_group, async_op=True
            )
        return Pending(out, work, source, self.watchdog, f"all_to_all over {self.name}")

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The values of the rank with index `source`, in place."""
        if self.size > 1 and x.numel():
            if self.index == source:
                self._count("broadcast", [x.numel() * x.element_size()] * self.size)
            whole = x if x.is_contiguous() else x.contiguous()
            with self._doing("broadcast"):
                dist.broadcast(_wire(whole), self.ranks[source], group=self.process_group)
            if whole is not x:
                x.copy_(whole)
        return x

    def send(self, x: Tensor, to: int) -> None:
        """Send x to the rank with index `to`, which calls `receive`."""
        self.traffic.count(self.name, "send", self.rank, [self.ranks[to]], [x.numel() * x.element_size()])
        with self._doing("send"):
            dist.send(_wire(x.contiguous()), self.ranks[to], group=self.process_group)

    def receive(self, out: Tensor, source: int) -> Tensor:
        """Fill `out`, which must be contiguous, with what the rank with index `source` sends."""
        with self._doing("receive"):
            dist.recv(_wire(out), self.ranks[source], group=self.process_group)
        return out

    def all_gather_object(self, value: Any) -> list[Any]:
        """Small Python values of all ranks, in order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._doing("all_gather_object"):
            dist.all_gather_object(found, value, group=self.process_group)
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce(torch.zeros(1, device=self._device()))

    def _device(self) -> torch.device:
        if self.size == 1 or dist.get_backend(self.process_group) == "gloo":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def _doing(self, operation: str) -> Any:
        return self.watchdog.doing(f"{operation} over {self.name}")

    def _count(self, operation: str, sizes: Sequence[int]) -> None:
        self.traffic.count(self.name, operation, self.rank, self.ranks, sizes)


def _wire(x: Tensor) -> Tensor:
    """What travels: gloo moves no float8, but bytes."""
    return x.view(torch.uint8) if x.dtype.is_floating_point and x.element_size() == 1 else x
