"""Every way in which some ranks fail: all raise, and say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moeforge.errors import RunError, UserError
from moeforge.parallel.consensus import require_same, together

RunRanks = Callable[..., list[Any]]


def what_all_raise(run_ranks: RunRanks, failures: dict[int, Exception], ranks: int = 3) -> list[tuple[str, str]]:
    """Type and message on each rank; ranks without a failure of their own go through the block. All meet twice."""

    def block(rank: int) -> tuple[str, str]:
        raised = ("", "")
        try:
            with together():
                if rank in failures:
                    raise failures[rank]
        except Exception as error:
            raised = type(error).__name__, str(error)
        with together():  # nobody was left behind
            pass
        return raised

    return run_ranks(ranks, block)


def test_all_go_on_where_none_fails(run_ranks: RunRanks) -> None:
    assert what_all_raise(run_ranks, {}) == [("", "")] * 3


def test_all_fail_alike(run_ranks: RunRanks) -> None:
    failures = {rank: UserError("run.dir: no") for rank in range(3)}
    assert what_all_raise(run_ranks, failures) == [("UserError", "run.dir: no")] * 3


def test_the_lowest_failing_rank_speaks_for_all(run_ranks: RunRanks) -> None:
    found = what_all_raise(run_ranks, {1: UserError("data.train: gone"), 2: UserError("data.train: cut short")})
    assert found == [("UserError", "rank 1: data.train: gone")] * 3


def test_all_fail_differently(run_ranks: RunRanks) -> None:
    failures: dict[int, Exception] = {0: UserError("a = 1"), 1: UserError("a = 2"), 2: KeyError("k")}
    assert what_all_raise(run_ranks, failures) == [("UserError", "rank 0: a = 1")] * 3


def test_a_run_error_stays_one(run_ranks: RunRanks) -> None:
    found = what_all_raise(run_ranks, {2: RunError("no space left on device")})
    assert found == [("RunError", "rank 2: no space left on device")] * 3


def test_a_fault_keeps_its_type_where_it_happened(run_ranks: RunRanks) -> None:
    found = what_all_raise(run_ranks, {1: KeyError("layers.0")})
    other = ("RunError", "rank 1: KeyError: 'layers.0'")
    assert found == [other, ("KeyError", "'layers.0'"), other]


def test_one_process_raises_what_was_raised() -> None:
    error = OSError(28, "No space left on device")
    with pytest.raises(OSError) as caught, together():
        raise error
    assert caught.value is error
    require_same("anything", "at all")


def test_an_interrupt_is_not_held_up() -> None:
    with pytest.raises(KeyboardInterrupt), together():
        raise KeyboardInterrupt


def test_ranks_that_differ_are_named_everywhere(run_ranks: RunRanks) -> None:
    def compare(rank: int, values: list[str]) -> str:
        try:
            require_same("the configuration", values[rank])
        except UserError as error:
            return str(error)
        return "same"

    assert run_ranks(3, compare, ["a", "a", "a"]) == ["same"] * 3
    assert (
        run_ranks(3, compare, ["a", "b", "c"])
        == ["the configuration: rank 1, 2 has another than rank 0; start all ranks with the same"] * 3
    )
