"""One step of the engine as plain numbers: what every rank needs to run the same forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceStep:
    """`tokens` of one sequence, the first at position `begin`; `block_ids` are its pages up to the last of them.

    `samples`: the logits of its last token are wanted.
    """

    tokens: tuple[int, ...]
    begin: int
    block_ids: tuple[int, ...]
    samples: bool

    @property
    def end(self) -> int:
        """Positions held after the step."""
        return self.begin + len(self.tokens)


@dataclass(frozen=True)
class StepBatch:
    """Sequences of one forward pass, in the order of its rows; logits come for those that sample, in this order."""

    sequences: tuple[SequenceStep, ...]

    def encode(self) -> list[int]:
        """Integers that `decode` reads back: what rank 0 sends to the others."""
        numbers = [len(self.sequences)]
        for s in self.sequences:
            numbers += [len(s.tokens), s.begin, len(s.block_ids), int(s.samples), *s.tokens, *s.block_ids]
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> StepBatch:
        """The inverse of `encode`."""
        sequences, at = [], 1
        for _ in range(numbers[0]):
            count, begin, blocks, samples = numbers[at : at + 4]
            at += 4
            tokens, block_ids = numbers[at : at + count], numbers[at + count : at + count + blocks]
            sequences.append(SequenceStep(tuple(tokens), begin, tuple(block_ids), bool(samples)))
            at += count + blocks
        return cls(tuple(sequences))
