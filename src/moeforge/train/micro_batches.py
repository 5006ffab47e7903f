"""Which sequences a rank computes in a step, and what its forward passes are given.

Legend: B sequences, S positions, T = B * S tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, overload

import torch

from moeforge.config.schema import TrainConfig
from moeforge.data import Batch, PackedDataset
from moeforge.model import DenseAttention, ForwardContext, RouterRecord, RoutingGroups
from moeforge.model.dispatcher import Dispatcher
from moeforge.parallel import Mesh
from moeforge.parallel.executor import MicroBatch
from moeforge.parallel.shard import TensorParallelShard


class TrainData(Protocol):
    """Where batches come from; `moeforge.data.PackedDataset` fits."""

    def batch(self, position: int, count: int) -> Batch:
        """The sequences with global numbers position..position+count-1."""
        ...

    def identity(self) -> str:
        """What the batches depend on, as a hash."""
        ...


class MicroBatches:
    """Cuts global batches for one rank.

    The global micro-batch i is the data-parallel ranks' i-th micro-batches one after another, so dp ranks with
    micro-batches of b sequences compute what one process computes with micro-batches of dp * b.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, dispatcher: Dispatcher) -> None:
        self.config, self.mesh, self.dispatcher = config, mesh, dispatcher
        self.sequences = config.train.micro_batch_sequences

    def training(self, data: TrainData, position: int) -> list[Batch]:
        """This rank's share of the step whose first sequence has the global number `position`."""
        stride = self.sequences * self.mesh.dp.size
        first = position + self.mesh.dp.index * self.sequences
        count = self.config.train.batch_sequences // stride
        return [data.batch(first + i * stride, self.sequences) for i in range(count)]

    def held_out(self, data: PackedDataset) -> list[Batch]:
        """This rank's share of at most eval.sequences sequences, filled up with padding so that all have as many."""
        wanted = min(self.config.eval.sequences, len(data))
        stride = self.sequences * self.mesh.dp.size
        batches = []
        for start in range(self.mesh.dp.index * self.sequences, -(-wanted // stride) * stride, stride):
            count = max(0, min(self.sequences, wanted - start))
            batches.append(_padded(data.batch(min(start, wanted), count), self.sequences))
        return batches

    def prepare(self, batch: Batch, index: int, scale: float, record: RouterRecord | None) -> MicroBatch:
        """`batch` on the device with its forward context; `scale` multiplies its summed loss."""
        router, mesh = self.config.router, self.mesh
        sequences, positions = batch.tokens.shape
        groups = None
        if record is not None:
            routed = batch.documents >= 0
            valid = None if bool(routed.all()) else routed.flatten().to(mesh.device)
            count = sequences // router.group_sequences
            groups = RoutingGroups(count, valid, router.capacity_factor, router.drop_tokens, sequences)
        context = ForwardContext(
            DenseAttention(sequences, positions, batch.documents),  # looks at values: on the host
            self.dispatcher,
            TensorParallelShard(mesh, sequences * positions),
            groups,
            record,
            index,
        )
        batch = batch.to(mesh.device)
        return MicroBatch(batch.tokens.flatten(), batch.positions.flatten(), batch.targets.flatten(), context, scale)


class Lazy(Sequence[MicroBatch]):
    """Micro-batches made when they are asked for: their attention masks are too large to keep for a whole step."""

    def __init__(self, count: int, make: Callable[[int], MicroBatch]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        chosen = range(self._count)[index]
        return self._make(chosen) if isinstance(chosen, int) else Lazy(len(chosen), lambda i: self._make(chosen[i]))


def targets_and_tokens(batches: list[Batch]) -> torch.Tensor:
    """int64 [2]: tokens with a loss, and tokens that are no padding."""
    targets = sum(int((batch.targets != -100).sum()) for batch in batches)
    tokens = sum(int((batch.documents >= 0).sum()) for batch in batches)
    return torch.tensor([targets, tokens])


def _padded(batch: Batch, sequences: int) -> Batch:
    """`batch` with rows of padding up to `sequences`."""
    missing = sequences - len(batch.tokens)
    if missing == 0:
        return batch
    filled = []
    for values, padding in ((batch.tokens, 0), (batch.targets, -100), (batch.positions, 0), (batch.documents, -1)):
        filled.append(torch.cat([values, values.new_full((missing, values.shape[1]), padding)]))
    return Batch(*filled)
