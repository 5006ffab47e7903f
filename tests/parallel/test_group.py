"""Every collective against what it says, with the sizes and types that break gloo when nobody looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeforge.parallel import Group, Traffic, Watchdog

RunRanks = Callable[..., list[Any]]
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def everyone(rank: int, size: int, node: int = 8) -> Group:
    process_group = dist.group.WORLD if size > 1 else None
    return Group("world", tuple(range(size)), rank, process_group, Traffic(node), Watchdog())


def rows_of(rank: int, rows: int, width: int = 2) -> torch.Tensor:
    """Rows that tell where they come from."""
    return 100.0 * rank + torch.arange(rows * width, dtype=torch.float64).view(rows, width)


def test_sums_maxima_gathers_and_broadcasts(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        group = everyone(rank, 3)
        for dtype in TYPES:
            own = torch.tensor([[rank + 1, 2], [3, rank], [rank, rank]]).to(dtype)
            total = torch.tensor([[6, 6], [9, 3], [3, 3]]).to(dtype)
            assert torch.equal(group.all_reduce(own.clone()), total)
            assert torch.equal(group.reduce_scatter(own), total[rank : rank + 1])
            assert torch.equal(group.maximum_(own.clone()), torch.tensor([[3, 2], [3, 2], [2, 2]]).to(dtype))
        for dtype in (*TYPES, torch.bool):
            own = torch.tensor([[rank, 1]]).to(dtype)
            assert torch.equal(group.all_gather(own), torch.tensor([[0, 1], [1, 1], [2, 1]]).to(dtype))
            assert torch.equal(group.broadcast(own.clone(), 1), torch.tensor([[1, 1]]).to(dtype))
        assert group.all_gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]

    run_ranks(3, check)


def test_results_in_place_also_where_memory_is_not_contiguous(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        group, storage = everyone(rank, 2), torch.full((2, 3), float(rank + 1))
        x = storage.t()
        assert group.all_reduce(x) is x and torch.equal(storage, torch.full((2, 3), 3.0))
        storage.fill_(rank)
        assert group.broadcast(x, 1) is x and torch.equal(storage, torch.ones(2, 3))
        scalar = torch.tensor(float(rank))
        assert group.maximum_(scalar) is scalar and scalar.item() == 1.0
        columns = torch.arange(6.0).view(3, 2).t()
        assert torch.equal(group.all_gather(columns), torch.cat([columns, columns]))

    run_ranks(2, check)


def test_all_to_all_with_uneven_and_empty_splits(run_ranks: RunRanks) -> None:
    """Rank i sends table[i][j] rows to rank j; the table has an idle sender, an idle receiver and an idle rank."""
    tables = [
        [[1, 2, 3], [0, 0, 0], [4, 0, 1]],
        [[0, 5, 0], [0, 1, 0], [0, 2, 0]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[2, 2, 2], [2, 2, 2], [2, 2, 2]],
    ]

    def check(rank: int) -> None:
        group = everyone(rank, 3)
        for table in tables:
            send, receive = table[rank], [row[rank] for row in table]
            got = group.all_to_all(rows_of(rank, sum(send)), send, receive)
            parts = [rows_of(source, sum(row)).split(row)[rank] for source, row in enumerate(table)]
            assert torch.equal(got, torch.cat(parts))
        flat = group.all_to_all(torch.arange(3) + 10 * rank, [1, 1, 1], [1, 1, 1])  # one dimension
        assert flat.tolist() == [rank, 10 + rank, 20 + rank]
        assert group.all_to_all(torch.empty(6, 0), [2, 2, 2], [2, 2, 2]).shape == (6, 0)

    run_ranks(3, check)


def test_nothing_to_send_is_no_error(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        group, nothing = everyone(rank, 2), torch.empty(0, 3)
        assert group.all_reduce(nothing) is nothing and group.maximum_(nothing) is nothing
        assert group.broadcast(nothing, 0) is nothing
        assert group.all_gather(nothing).shape == group.reduce_scatter(nothing).shape == (0, 3)
        assert group.all_gather(torch.empty(2, 0)).shape == (4, 0)
        assert group.reduce_scatter(torch.empty(4, 0)).shape == (2, 0)
        assert group.all_to_all(nothing, [0, 0], [0, 0]).shape == (0, 3)
        assert not group.traffic.sent

    run_ranks(2, check)


def test_float8_travels_as_bytes(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        group = everyone(rank, 2)
        for dtype in FLOAT8:
            own = torch.tensor([[0.5, rank], [float("nan"), -2.0]]).to(dtype)
            bits = [torch.tensor([[0.5, r], [float("nan"), -2.0]]).to(dtype).view(torch.uint8) for r in range(2)]

            def same(x: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = dtype) -> bool:
                return x.dtype == dtype and torch.equal(x.view(torch.uint8), expected)

            assert same(group.all_gather(own), torch.cat(bits))
            assert same(group.all_to_all(own, [1, 1], [1, 1]), torch.stack([bits[0][rank], bits[1][rank]]))
            assert same(group.broadcast(own.clone(), 1), bits[1])
            if rank == 0:
                group.send(own, 1)
            else:
                assert same(group.receive(torch.empty_like(own), 0), bits[0])

    run_ranks(2, check)


def test_sizes_that_do_not_fit_raise_before_gloo_aborts(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        group, x = everyone(rank, 2), torch.zeros(3, 2)
        for send, receive in [
            ([1, 1], [1, 1]),  # not all rows
            ([3], [3]),
            ([2, 1], [2, 1, 0]),
            ([4, -1], [4, -1]),
            ([3, 0] if rank == 0 else [0, 3], [2, 0] if rank == 0 else [0, 2]),  # less comes from oneself than goes
        ]:
            with pytest.raises(ValueError, match="world: splits"):
                group.start_all_to_all(x, send, receive)
        with pytest.raises(ValueError, match="world: 3 rows do not divide by 2 ranks"):
            group.reduce_scatter(x)
        assert group.all_reduce(torch.ones(1)).item() == 2.0  # still able to speak

    run_ranks(2, check)


def test_an_exchange_goes_on_behind_the_computation(run_ranks: RunRanks) -> None:
    """Several under way, waited for in another order; what was sent may be forgotten by the caller at once."""

    def check(rank: int) -> None:
        group = everyone(rank, 2)
        pending = []
        for number in range(8):
            x = torch.full((2000, 16), float(10 * number + rank))
            pending.append(group.start_all_to_all(x, [1000, 1000], [1000, 1000]))
            del x
            torch.rand(2000, 16)  # would take the memory of a tensor that nobody holds
        for number in reversed(range(8)):
            got = pending[number].wait()
            assert got is pending[number].wait()  # again costs nothing
            expected = torch.tensor([10.0 * number, 10.0 * number + 1]).repeat_interleave(1000)
            assert torch.equal(got, expected[:, None].expand(-1, 16))

    run_ranks(2, check)


def test_starting_does_not_wait_for_the_others(run_ranks: RunRanks) -> None:
    def seconds(rank: int) -> float:
        group = everyone(rank, 2)
        group.barrier()
        if rank == 1:
            time.sleep(1.0)
        began = time.monotonic()
        pending = group.start_all_to_all(torch.ones(2, 4), [1, 1], [1, 1])
        started = time.monotonic() - began
        pending.wait()
        return started

    assert run_ranks(2, seconds)[0] < 0.5


def test_subgroups_count_by_their_own_index(run_ranks: RunRanks) -> None:
    def check(rank: int) -> None:
        ranks = (0, 2) if rank in (0, 2) else (1,)
        process_group = dist.new_group([0, 2])
        group = Group("some", ranks, rank, process_group if rank != 1 else None, Traffic(3), Watchdog())
        assert group.index == ranks.index(rank)
        x = torch.tensor([float(rank)])
        assert group.broadcast(x.clone(), group.size - 1).item() == ranks[-1]
        assert group.all_gather(x).tolist() == list(ranks)
        if rank == 0:
            group.send(x, 1)
        elif rank == 2:
            assert group.receive(torch.empty(1), 0).item() == 0.0

    run_ranks(3, check)


def test_a_group_of_one_communicates_nothing() -> None:
    group, x = everyone(0, 1), torch.ones(4, 2)
    for same in (group.all_reduce, group.maximum_, group.all_gather, group.reduce_scatter):
        assert same(x) is x
    assert group.broadcast(x, 0) is x and group.all_to_all(x, [4], [4]) is x
    assert group.all_gather_object("a") == ["a"]
    group.barrier()
    assert not group.traffic.sent
    with pytest.raises(ValueError, match="splits"):
        group.all_to_all(x, [4], [3])


def test_what_the_watchdog_hears(run_ranks: RunRanks) -> None:
    """Every collective is an operation `NAME over GROUP` while it runs, and done afterwards."""

    def check(rank: int) -> list[str]:
        group, heard = everyone(rank, 2), list[str]()
        plain = group.watchdog.doing

        def doing(operation: str) -> Any:
            heard.append(operation)
            return plain(operation)

        group.watchdog.doing = doing  # type: ignore[method-assign]
        x = torch.ones(2, 1)
        group.all_reduce(x)
        group.all_gather(x)
        group.reduce_scatter(x)
        group.broadcast(x, 0)
        group.all_to_all(x, [1, 1], [1, 1])
        group.all_gather_object(1)
        if rank:
            group.receive(x, 0)
        else:
            group.send(x, 1)
        return heard

    names = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "all_to_all", "all_gather_object"]
    expected = [f"{name} over world" for name in names]
    assert run_ranks(2, check) == [[*expected, "send over world"], [*expected, "receive over world"]]
