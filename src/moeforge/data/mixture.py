"""In what order an epoch visits the sequences of a mixture."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sequences_per_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many sequences of each source an epoch has: natural size times weight, rounded, at least one."""
    return [max(1, round(n * w)) if n and w else 0 for n, w in zip(sizes, weights, strict=True)]


def epoch_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    """The sequences of one epoch in order, numbered through all sources [sum(counts)].

    Each source gives counts[i] of its sizes[i] sequences: whole rounds of all of them, and for the rest a
    part of a fixed shuffle that moves on with each epoch, so that after a few epochs all were seen equally
    often. A function of its arguments only.
    """
    parts = []
    offset = 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        rounds, rest = divmod(count, size) if size else (0, 0)
        parts.append(np.tile(np.arange(offset, offset + size), rounds))
        if rest:
            shuffled = _generator(seed, 1, source).permutation(size)
            parts.append(offset + shuffled[(epoch * rest + np.arange(rest)) % size])
        offset += size
    order = np.concatenate(parts).astype(np.int64)
    return _generator(seed, 0, epoch).permutation(order)


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed % 2**64, purpose, number]))
