"""Random schedules of coming, leaving and running out of pages: no token is lost, doubled or mixed, no page leaks.

The model here is one that writes, into the slot of each position, the salt and all tokens up to there. Whoever reads
another's page, or one that was overwritten, sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moeforge.errors import UserError
from moeforge.serve.outputs import Sampled
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.scheduler import ScheduledRequest, Scheduler, WaitingQueueFull

Content = tuple[bytes, tuple[int, ...]]
VOCAB_SIZE = 997
ENDS = frozenset(range(0, VOCAB_SIZE, 31))


def token(request_id: str, index: int, position: int) -> int:
    """What the model says at a position, whatever was computed beside it."""
    return crc32(f"{request_id} {index} {position}".encode()) % VOCAB_SIZE


def new_request(request_id: str, index: int, prompt: list[int], room: int, salt: bytes) -> Request:
    """One that ends after `room` tokens, or before with an end token."""
    params = SamplingParams(max_tokens=room)
    return Request(request_id, None, prompt, params, room, ENDS, index=index, cache_salt=salt)


def content(request: Request, position: int) -> Content:
    return request.cache_salt, tuple(request.all_token_ids[: position + 1])


class Schedules(RuleBasedStateMachine):
    """Every rule is a call that the engine may make, at a moment at which it may make it."""

    prefix_caching = True

    @initialize(
        num_blocks=st.integers(4, 12),
        block_size=st.integers(1, 4),
        max_num_seqs=st.sampled_from([4, 1, 2, 3, 6, 6]),
        max_num_batched_tokens=st.sampled_from([16, 1, 2, 3, 5, 8, 8, 16]),
        max_waiting=st.sampled_from([6, 1, 3, 6]),
    )
    def start(self, **sizes: int) -> None:
        self.sizes = sizes
        self.places = sizes["num_blocks"] * sizes["block_size"]
        self.scheduler = Scheduler(**sizes, prefix_caching=self.prefix_caching)
        self.memory: dict[tuple[int, int], Content] = {}  # by page and slot
        self.requests: list[Request] = []  # all that ever were added
        self.step: tuple[ScheduledRequest, ...] | None = None  # scheduled, but not yet updated
        self.log: list[tuple[Any, ...]] = []
        self.decisions: list[Any] = []

    # What a user does.

    @rule(
        base=st.one_of(st.lists(st.integers(0, 1), min_size=1, max_size=4), st.integers(0, 20)),
        more=st.lists(st.integers(0, 1), max_size=5),
        room=st.sampled_from([8, 1, 3, 5, 12, 99]),
        n=st.sampled_from([3, 1, 2, 4]),
        salt=st.sampled_from([b"", b"", b"tenant"]),
    )
    def add(self, base: list[int] | int, more: list[int], room: int, n: int, salt: bytes) -> None:
        if isinstance(base, int):  # goes on from an earlier request, as the next turn of a conversation does
            base = list(self.requests[base % len(self.requests)].all_token_ids) if self.requests else [0]
        if room < 99:  # else refused, mostly
            room = max(1, min(room, self.places + 1 - len(base) - len(more)))
        request_id = f"r{len(self.requests)}"
        for index in range(n):
            request = new_request(request_id, index, [*base, *more], room, salt)
            prompt = request.prompt_token_ids
            try:
                self.scheduler.add(request)
            except UserError:
                assert len(prompt) + room - 1 > self.places
                return
            except WaitingQueueFull:
                assert self.waiting_for_the_first_time() >= self.sizes["max_waiting"]
                return
            assert len(prompt) + room - 1 <= self.places
            self.log.append(("add", request_id, index, prompt, room, salt))
            self.requests.append(request)

    def waiting_for_the_first_time(self) -> int:
        return sum(request not in self.ran for request in self.scheduler.waiting)

    @property
    def ran(self) -> set[Request]:
        return {request for step in self.decisions for request, *_ in step}

    @rule(which=st.integers(0, 20))
    def abort(self, which: int) -> None:
        here = [*self.scheduler.running, *self.scheduler.waiting]
        if which >= len(here):  # seldom enough for some to finish
            return
        request_id = here[which].request_id
        aborted = self.scheduler.abort(request_id)
        self.log.append(("abort", request_id))
        assert aborted == [request for request in here if request.request_id == request_id]
        assert all(request.finish_reason == "abort" and not request.block_ids for request in aborted)

    # What the engine does.

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        s = self.scheduler
        running, waiting, preemptions = list(s.running), list(s.waiting), s.preemptions
        self.step = s.schedule()
        self.log.append(("schedule",))
        self.decisions.append([(x.request, x.begin, x.count, tuple(x.request.block_ids)) for x in self.step])
        assert bool(self.step) == s.has_work
        assert sum(x.count for x in self.step) <= self.sizes["max_num_batched_tokens"]
        assert len(s.running) <= self.sizes["max_num_seqs"]
        # All that run get on, in the order in which they came to run; the preempted are the last of them.
        assert [x.request for x in self.step] == s.running
        lost = s.preemptions - preemptions
        kept = running[: len(running) - lost]
        assert s.running[: len(kept)] == kept and (kept or not running)
        if lost:
            assert s.running == kept and list(s.waiting) == running[len(kept) :] + waiting
        else:
            assert s.running[len(kept) :] + list(s.waiting) == waiting
        for x in self.step:
            assert x.begin == x.request.num_computed_tokens and x.count > 0
            assert x.samples == (x.begin + x.count == x.request.num_tokens)
            assert x.samples or x is self.step[-1]
            assert len(x.request.block_ids) == s.pool.blocks_for(x.begin + x.count)

    def slot(self, table: Sequence[int], position: int) -> tuple[int, int]:
        page, slot = divmod(position, self.sizes["block_size"])
        return table[page], slot

    def verify(self, request: Request, positions: int) -> None:
        """That the pages of a request hold just its tokens."""
        for position in range(positions):
            assert self.memory[self.slot(request.block_ids, position)] == content(request, position)

    @precondition(lambda self: self.step is not None)
    @rule()
    def update(self) -> None:
        """Computes the step and takes it in."""
        assert self.step is not None
        alive = [x for x in self.step if x.request.finish_reason is None]
        for x in alive:
            self.verify(x.request, x.begin)
        # As it was decided, those aborted since then too: their pages are free, but cannot be another's yet.
        for request, begin, count, table in self.decisions[-1]:
            for position in range(begin, begin + count):
                self.memory[self.slot(table, position)] = content(request, position)
        for x in alive:
            self.verify(x.request, x.begin + x.count)
        drawing = [x.request for x in self.step if x.samples]
        sampled = [Sampled(token(r.request_id, r.index, r.num_tokens)) for r in drawing]
        before = [x.request.num_tokens for x in self.step]
        self.scheduler.update(self.step, sampled)
        self.log.append(("update", sampled))
        for x, tokens in zip(self.step, before, strict=True):
            expected = x.samples and x.request.finish_reason != "abort"
            assert x.request.num_tokens == tokens + expected
        self.step = None

    @precondition(lambda self: self.step is None)
    @rule(steps=st.integers(1, 3))
    def go_on(self, steps: int) -> None:
        """Several steps in which nobody comes or leaves."""
        for _ in range(steps):
            if self.scheduler.has_work:
                self.schedule()
                self.update()

    # What must always hold.

    @invariant()
    def nothing_is_lost(self) -> None:
        s = self.scheduler
        s.check()
        here = [*s.running, *s.waiting]
        assert set(here) == {request for request in self.requests if request.finish_reason is None}
        assert len(here) == len(set(here)) == s.num_running + s.num_waiting
        assert all(request.num_computed_tokens == 0 for request in s.waiting)
        for request in s.running:
            self.verify(request, request.num_computed_tokens)
        used = {block for request in s.running for block in request.block_ids}
        assert s.kv_cache_usage == pytest.approx(len(used) / self.sizes["num_blocks"])
        assert 0 <= s.prefix_hits_tokens <= s.prefix_queries_tokens
        if not self.prefix_caching:
            assert s.prefix_queries_tokens == 0 and len(used) == sum(len(r.block_ids) for r in s.running)

    def teardown(self) -> None:
        if self.step is not None:
            self.update()
        most = sum(r.num_tokens + r.room for r in self.requests) * (1 + len(self.requests))
        while self.scheduler.has_work:
            self.schedule()
            self.update()
            self.nothing_is_lost()
            most -= 1
            assert most > 0, "no end"
        assert self.scheduler.pool.num_free == self.sizes["num_blocks"]
        for request in self.requests:
            positions = range(len(request.prompt_token_ids), request.num_tokens)
            expected = [token(request.request_id, request.index, position) for position in positions]
            assert request.output_token_ids == expected
            ended = [drawn in ENDS for drawn in expected]
            assert True not in ended[:-1] and len(expected) <= request.room
            if request.finish_reason == "stop":
                assert ended[-1]
            elif request.finish_reason == "length":
                assert len(expected) == request.room and not ended[-1]
            else:
                assert request.finish_reason == "abort"
        self.replay()

    def replay(self) -> None:
        """The same calls again lead to the same decisions, down to the pages."""
        s = Scheduler(**self.sizes, prefix_caching=self.prefix_caching)
        step: tuple[ScheduledRequest, ...] = ()
        decisions = iter(self.decisions)
        for call, *values in self.log:
            if call == "add":
                request_id, index, prompt, room, salt = values
                s.add(new_request(request_id, index, prompt, room, salt))
            elif call == "abort":
                s.abort(*values)
            elif call == "update":
                s.update(step, *values)
            else:
                step = s.schedule()
                made = [(x.request.request_id, x.request.index, x.begin, x.count, x.request.block_ids) for x in step]
                assert made == [
                    (request.request_id, request.index, begin, count, list(blocks))
                    for request, begin, count, blocks in next(decisions)
                ]


class SchedulesWithoutCaching(Schedules):
    prefix_caching = False


MACHINES = pytest.mark.parametrize("machine", [Schedules, SchedulesWithoutCaching])
CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@MACHINES
def test_random_schedules(machine: type[Schedules]) -> None:
    wanted = settings(max_examples=100, stateful_step_count=60, suppress_health_check=CHECKS)
    run_state_machine_as_test(machine, settings=wanted)  # type: ignore[no-untyped-call]


@pytest.mark.slow
@MACHINES
def test_many_random_schedules(machine: type[Schedules]) -> None:
    wanted = settings(max_examples=1000, stateful_step_count=100, suppress_health_check=CHECKS)
    run_state_machine_as_test(machine, settings=wanted)  # type: ignore[no-untyped-call]
