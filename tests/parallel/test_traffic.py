"""Bytes by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.parallel.traffic import Route


def test_links_by_node() -> None:
    traffic = Traffic(2)
    traffic.count("dp", "all_gather", 2, (0, 1, 2, 3, 4), (1, 10, 100, 1000, 10000))
    assert traffic.sent == {
        Route("dp", "all_gather", "inter-node"): 10011,
        Route("dp", "all_gather", "intra-node"): 1000,  # what it keeps (100) is not sent
    }
    traffic.count("dp", "all_gather", 2, (2, 3), (5, 5))
    assert traffic.sent[Route("dp", "all_gather", "intra-node")] == 1005


def test_each_operation_counts_what_a_direct_exchange_sends(run_ranks: Callable[..., list[Any]]) -> None:
    """Four ranks on two nodes of two; rows of 3 float32 = 12 bytes."""

    def sent(rank: int) -> dict[str, tuple[int, int]]:
        group = Group("world", (0, 1, 2, 3), rank, dist.group.WORLD, Traffic(2), Watchdog())
        group.all_gather(torch.zeros(2, 3))
        group.reduce_scatter(torch.zeros(8, 3))
        group.all_reduce(torch.zeros(8, 3))
        group.broadcast(torch.zeros(1, 3), 1)
        # Rank r sends r + 1 rows to each of the next two ranks.
        table = [[i + 1 if (j - i) % 4 in (1, 2) else 0 for j in range(4)] for i in range(4)]
        group.all_to_all(torch.zeros(sum(table[rank]), 3), table[rank], [row[rank] for row in table])
        if rank == 0:
            group.send(torch.zeros(5), 3)
        elif rank == 3:
            group.receive(torch.zeros(5), 0)
        operations = {route.operation for route in group.traffic.sent}
        return {
            name: (
                group.traffic.sent[Route("world", name, "intra-node")],
                group.traffic.sent[Route("world", name, "inter-node")],
            )
            for name in operations
        }

    for rank, found in enumerate(run_ranks(4, sent)):
        one = 12 * (rank + 1)  # to the next rank and to the one after it, which is always on the other node
        expected = {
            "all_gather": (24, 48),
            "reduce_scatter": (24, 48),
            "all_reduce": (48, 96),  # a reduce-scatter and an all-gather
            "all_to_all": (one, one) if rank % 2 == 0 else (0, 2 * one),
        }
        if rank == 1:
            expected["broadcast"] = (12, 24)
        if rank == 0:
            expected["send"] = (0, 20)
        assert found == expected
