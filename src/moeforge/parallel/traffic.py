"""Bytes on the wire, by group, operation and kind of link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Route(NamedTuple):
    """What bytes are counted by: the group's name, the operation, "intra-node" or "inter-node"."""

    group: str
    operation: str
    link: str


class Traffic:
    """Bytes that this rank has sent to other ranks.

    Counted as if every part went straight to the peer that needs it: an all-gather sends the own part to each peer, a
    reduce-scatter each peer its part, an all-reduce does both, a broadcast sends from its source, an all-to-all what
    its splits say. That is the least any algorithm moves in sum, and what tells inside from across nodes; libraries may
    route otherwise. Ranks rank // local_world_size share a node.
    """

    def __init__(self, local_world_size: int) -> None:
        self.local_world_size = local_world_size
        self.sent: Counter[Route] = Counter()

    def count(self, group: str, operation: str, me: int, peers: Sequence[int], sizes: Sequence[int]) -> None:
        """`sizes[i]` bytes to world rank `peers[i]`; what stays on this rank is not counted."""
        node = me // self.local_world_size
        for peer, size in zip(peers, sizes, strict=True):
            if peer != me and size:
                link = "intra-node" if peer // self.local_world_size == node else "inter-node"
                self.sent[Route(group, operation, link)] += size
