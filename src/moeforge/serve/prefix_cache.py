"""Digests of full pages: two are equal only for equal tokens from the very beginning, of the same tenant."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256

# What is hashed at the root and at a page begins differently: else a salt chosen as the bytes of some page would make a
# tenant's root equal to the digest of another tenant's page.
_ROOT, _PAGE = b"root", b"page"


class PageDigests:
    """Chained sha256 digests of one sequence's full pages, each made when it is first asked for, and kept.

    The root is the digest of `salt`; a page's digest is that of its parent's and of its token ids at 8 bytes each.
    """

    def __init__(self, salt: bytes, block_size: int) -> None:
        self._block_size = block_size
        self._chain = [sha256(_ROOT + salt).digest()]

    def page(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Digest of page `index`, which must be full: `token_ids` are all of the sequence and only ever grow."""
        while len(self._chain) <= index + 1:
            begin = (len(self._chain) - 1) * self._block_size
            tokens = array("q", token_ids[begin : begin + self._block_size])
            assert len(tokens) == self._block_size, "only full pages have a digest"
            self._chain.append(sha256(_PAGE + self._chain[-1] + tokens.tobytes()).digest())
        return self._chain[index + 1]
