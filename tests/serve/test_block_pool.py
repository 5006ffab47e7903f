"""Pages are never lost, reused in the promised order, and found by what they hold only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.errors import RunError
from moeforge.serve.block_pool import BlockPool
from moeforge.serve.prefix_cache import PageDigests


def digests(tokens: list[int], salt: bytes = b"", block_size: int = 2) -> list[bytes]:
    chain = PageDigests(salt, block_size)
    return [chain.page(index, tokens) for index in range(len(tokens) // block_size)]


def test_pages_come_and_go() -> None:
    pool = BlockPool(4, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    table = pool.allocate(3)
    assert table == [0, 1, 2] and pool.num_free == 1
    pool.check([table])
    pool.free(table)
    assert pool.num_free == 4
    pool.check([])


def test_too_many_pages_and_double_frees_are_faults() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(RunError, match="3 pages asked for, 2 are free"):
        pool.allocate(3)
    assert pool.num_free == 2
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(RunError, match="page 0 was freed twice"):
        pool.free(table)


@pytest.mark.parametrize("tables", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_check_finds_a_table_that_was_not_counted(tables: list[list[int]]) -> None:
    pool = BlockPool(3, 16)
    pool.allocate(2)
    with pytest.raises(RunError, match=r"page \d is in \d tables"):
        pool.check(tables)


def test_a_free_page_is_found_until_it_is_needed() -> None:
    pool = BlockPool(3, 2)
    names = digests([1, 2, 3, 4])
    table = pool.allocate(2)
    for block, digest in zip(table, names, strict=True):
        pool.register(block, digest)
    pool.free(table)
    assert pool.find(names) == table
    pool.allocate(1)  # the page that holds nothing
    assert pool.find(names) == table
    assert pool.allocate(1) == [1]  # then the later page of the sequence: of no use without the one before
    assert pool.find(names) == [0]
    pool.allocate(1)
    assert pool.find(names) == []


def test_pages_that_were_freed_first_are_reused_first() -> None:
    pool = BlockPool(3, 2)
    for block in pool.allocate(3):
        pool.register(block, digests([block, block])[0])
    for block in (2, 0, 1):
        pool.free([block])
    pool.share([2])  # used once more, so now the latest
    pool.free([2])
    assert pool.allocate(3) == [0, 1, 2]


def test_pages_that_cannot_be_found_are_reused_before_all_others() -> None:
    pool = BlockPool(2, 2)
    kept, other = pool.allocate(2)
    pool.register(kept, digests([1, 2])[0])
    pool.free([kept])
    pool.free([other])
    assert pool.allocate(1) == [other]


def test_a_shared_page_is_free_when_all_gave_it_up() -> None:
    pool = BlockPool(3, 2)
    first = pool.allocate(1)
    pool.register(first[0], digests([1, 2])[0])
    pool.share(first)
    second = first + pool.allocate(1)
    pool.check([first, second])
    assert pool.num_free_beside(first) == 1
    pool.free(first)
    pool.check([second])
    assert pool.num_free == 1
    pool.free(second)
    pool.check([])
    assert (pool.num_free, pool.num_free_beside(first)) == (3, 2)


def test_of_two_equal_pages_the_first_is_found() -> None:
    pool = BlockPool(2, 2)
    name = digests([1, 2])
    for block in pool.allocate(2):
        pool.register(block, name[0])
    assert pool.find(name) == [0]
    pool.free([1])
    assert pool.allocate(1) == [1] and pool.find(name) == [0]
    pool.check([[0], [1]])


def test_nothing_is_asked_for_after_the_first_unknown_page() -> None:
    def names() -> object:
        yield b"unknown"
        raise AssertionError("asked on")

    assert BlockPool(1, 2).find(names()) == []  # type: ignore[arg-type]


TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=8)
SALTS = st.sampled_from([b"", b"a", b"b"])


@given(TOKENS, TOKENS, SALTS, SALTS)
def test_digests_are_equal_only_for_equal_beginnings_and_salts(
    one: list[int], other: list[int], salt: bytes, other_salt: bytes
) -> None:
    found = zip(digests(one, salt), digests(other, other_salt), strict=False)
    for page, (a, b) in enumerate(found, start=1):
        assert (a == b) == (salt == other_salt and one[: 2 * page] == other[: 2 * page])


def test_a_digest_waits_until_its_page_is_full_and_follows_the_growing_sequence() -> None:
    tokens, chain = [1, 2, 3], PageDigests(b"", 2)
    chain.page(0, tokens)
    with pytest.raises(AssertionError):
        chain.page(1, tokens)
    tokens.append(4)
    assert chain.page(1, tokens) == digests([1, 2, 3, 4])[1]


def test_no_salt_reaches_the_pages_of_another_tenant() -> None:
    """A salt of just the bytes that were hashed for a page would otherwise continue after that page."""
    root = PageDigests(b"victim", 1)
    page = root.page(0, [7])
    hashed = root._chain[0] + (7).to_bytes(8, "little")
    for salt in (hashed, b"page" + hashed, page):
        assert PageDigests(salt, 1).page(0, [8]) != root.page(1, [7, 8])
