"""Training sequences out of token caches, by global number.

Legend: B sequences, S positions, N tokens of a stream.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeforge.data.cache import TokenCache, TokenStream
from moeforge.data.mixture import epoch_order, sequences_per_epoch
from moeforge.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """B rows of S positions.

    tokens     [B,S] int64
    targets    [B,S] int64, the next token; -100 for no loss: across documents, padding, other speakers
    positions  [B,S] int64, from 0 at each document and at the row's start, so always less than S
    documents  [B,S] int32, number of the document within the row; -1 is padding
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor

    def slice(self, start: int, stop: int) -> "Batch":
        """The rows start..stop-1, as views."""
        return Batch(*(getattr(self, f.name)[start:stop] for f in fields(self)))

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class PackedDataset:
    """Consecutive S-token windows of packed streams, shuffled anew each epoch.

    `len()` is the number of sequences an epoch. Of a stream of N tokens there are ceil((N - 1) / S) windows,
    the last one padded: an epoch at weight 1 reads every token once. Sources mix by their caches' weights,
    which multiply their natural sizes (see Source); the held-out part is read unweighted. The sequences at a
    position depend on the caches, the sequence length and the seed, on nothing read before.

    Raises UserError: less training data than one sequence, nothing to predict in the held-out part, or caches
    of different tokenizers.
    """

    def __init__(
        self,
        caches: TokenCache | Sequence[TokenCache],
        sequence_length: int,
        seed: int = 0,
        split: Literal["train", "held_out"] = "train",
    ) -> None:
        caches = [caches] if isinstance(caches, TokenCache) else list(caches)
        if sequence_length < 1:
            raise UserError(f"data.sequence_length {sequence_length}: must be at least 1")
        if len({cache.meta["tokenizer_fingerprint"] for cache in caches}) > 1:
            raise UserError("data: the token caches were made by different tokenizers; build them with one")
        self.sequence_length, self.seed, self.split = sequence_length, seed, split
        self._streams: list[TokenStream] = [getattr(cache, split) for cache in caches]
        self._eos_id = caches[0].eos_id if caches else 0
        self._caches = caches
        self._weights = [cache.weight if split == "train" else 1.0 for cache in caches]
        self._sizes = [max(0, -(-(len(stream) - 1) // sequence_length)) for stream in self._streams]
        self._counts = sequences_per_epoch(self._sizes, self._weights)
        self._offsets = np.cumsum([0, *self._sizes])
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._check_enough()

    def __len__(self) -> int:
        return sum(self._counts)

    @property
    def tokens(self) -> int:
        """Tokens in the streams read, each counted once."""
        return sum(map(len, self._streams))

    def identity(self) -> str:
        """Hash of all that decides what `batch` returns: equal for equal content, wherever and whenever it was read."""
        parts = [
            [cache.eos_id, part["tokens"], weight, part["content"]]
            for cache, weight in zip(self._caches, self._weights, strict=True)
            for part in [cache.meta["splits"][self.split]]
        ]
        settings = [self.sequence_length, self.seed, self.split]
        return hashlib.sha256(json.dumps([parts, settings]).encode()).hexdigest()

    def batch(self, position: int, count: int) -> Batch:
        """The sequences with global numbers position..position+count-1; epochs follow one another."""
        if position < 0 or count < 0:
            raise ValueError(f"batch({position}, {count}): neither may be negative")
        epochs, places = np.divmod(np.arange(position, position + count), len(self))
        sequences = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            sequences[chosen] = self._order(int(epoch))[places[chosen]]
        return self._read(sequences)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # A batch may lie across two epochs; more are never needed at once.
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = epoch_order(self._sizes, self._counts, self.seed, epoch)
        return self._orders[epoch]

    def _read(self, sequences: NDArray[np.int64]) -> Batch:
        shape = (len(sequences), self.sequence_length)
        tokens, targets, positions = (np.empty(shape, np.int64) for _ in range(3))
        documents = np.empty(shape, np.int32)
        owners = np.searchsorted(self._offsets, sequences, side="right") - 1
        for owner in np.unique(owners):
            rows = owners == owner
            window = self._windows(self._streams[owner], sequences[rows] - self._offsets[owner])
            tokens[rows], targets[rows], positions[rows], documents[rows] = window
        return Batch(*map(torch.from_numpy, (tokens, targets, positions, documents)))

    def _windows(self, stream: TokenStream, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Tokens, targets, positions and documents [B,S] of windows of one stream; looks at S + 1 tokens."""
        first = windows[:, None] * self.sequence_length
        index = first + np.arange(self.sequence_length + 1)
        inside = index < len(stream)
        index = np.minimum(index, len(stream) - 1)
        tokens = stream.tokens[index].astype(np.int64)
        owner = np.searchsorted(stream.starts, index, side="right") - 1
        begins = np.maximum(stream.starts[owner], first)
        predicted = inside[:, 1:] & (owner[:, 1:] == owner[:, :-1]) & stream.loss_at(index[:, 1:])
        inside = inside[:, :-1]
        return (
            np.where(inside, tokens[:, :-1], self._eos_id),
            np.where(predicted, tokens[:, 1:], IGNORE),
            np.where(inside, (index - begins)[:, :-1], 0),
            np.where(inside, (owner - owner[:, :1])[:, :-1], -1),
        )

    def _check_enough(self) -> None:
        labels = ", ".join(repr(cache.label) for cache in self._caches) or "no source"
        read = [cache for cache, weight in zip(self._caches, self._weights, strict=True) if weight]
        wanted = [cache.meta["splits"][self.split] for cache in read]
        tokens = sum(counts["tokens"] for counts in wanted)
        if self.split == "train" and tokens < self.sequence_length:
            raise UserError(
                f"data.sequence_length {self.sequence_length}: the training part of {labels} has "
                f"only {tokens} tokens; give more data or a shorter sequence_length"
            )
        if len(self) == 0 or not sum(counts["loss_tokens"] for counts in wanted):
            what = "training" if self.split == "train" else "held-out"
            raise UserError(
                f"data: the {what} part of {labels} has nothing to predict ({tokens} tokens); "
                f"give more data or change data.holdout_fraction"
            )
