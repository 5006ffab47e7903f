"""Which pages of the KV cache are taken, by how many sequences, and what those hold that can be shared."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from moeforge.errors import RunError


class BlockPool:
    """`num_blocks` pages of `block_size` positions, numbered from 0. Knows numbers only, no memory.

    A page can be in several sequences' tables (a shared beginning) and is free when it is in none. A free page that was
    registered under a digest can be found and taken again until it is needed for something else: free pages are reused
    in the order in which they became free, those that cannot be found before all others.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # reused from the front
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the inverse

    @property
    def num_free(self) -> int:
        """Pages in no table."""
        return len(self._free)

    def blocks_for(self, positions: int) -> int:
        """Pages that so many positions take."""
        return -(-positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` free pages, each now in one table. Raises RunError if there are fewer."""
        if count > len(self._free):
            raise RunError(f"KV cache: {count} pages asked for, {len(self._free)} are free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            digest = self._digests.pop(block, None)
            if digest is not None:
                del self._blocks[digest]
            self._references[block] = 1
            taken.append(block)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Takes pages, in their table's order, out of one table. Raises RunError for one that is in none."""
        # From the last to the first: a page is of no use without those before it, so it is to be reused before them.
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RunError(f"KV cache: page {block} was freed twice")
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._digests:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Lets a page that is full and computed be found. Where another of this digest can be, that one stays."""
        if self._blocks.setdefault(digest, block) == block:
            self._digests[block] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest known beginning of `digests`, free or not. Takes none after the first unknown one."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_beside(self, blocks: Iterable[int]) -> int:
        """Free pages once these (found ones) are shared."""
        return len(self._free) - sum(not self._references[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Puts pages that were found into one more table."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises RunError unless every page is free or in exactly as many of these tables as was counted."""
        counts = Counter(block for table in tables for block in table)
        for block, references in enumerate(self._references):
            if counts[block] != references or (references == 0) != (block in self._free):
                state = "free" if block in self._free else "not free"
                raise RunError(f"KV cache: page {block} is in {counts[block]} tables, counted {references}, {state}")
        if self._digests != {block: digest for digest, block in self._blocks.items()}:
            raise RunError("KV cache: digests and pages disagree")
