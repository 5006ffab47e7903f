"""Counting bytes along a piece of code: what is alive after every line, and the most there ever was."""

from __future__ import annotations


class Ledger:
    """Lines that mirror the code in question: `take` where it allocates, `free` where it lets go."""

    def __init__(self) -> None:
        self.live = self.peak = 0.0

    def take(self, *sizes: float) -> None:
        """All of them are alive at once."""
        self.live += sum(sizes)
        self.peak = max(self.peak, self.live)

    def free(self, *sizes: float) -> None:
        """All of them."""
        self.live -= sum(sizes)

    def visit(self, *sizes: float) -> None:
        """Bytes that are gone right after."""
        self.take(*sizes)
        self.free(*sizes)
