"""The scheduler's decisions, one by one. `test_schedules.py` tries them in random order."""

from __future__ import annotations

from typing import Any

import pytest

from moeforge.errors import UserError
from moeforge.serve.outputs import Sampled
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams
from moeforge.serve.scheduler import Scheduler, WaitingQueueFull


def scheduler(**changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_waiting": 16,
        "prefix_caching": False,
    }
    return Scheduler(**settings | changes)


def add(s: Scheduler, name: str, length: int | list[int], room: int = 4, **values: Any) -> Request:
    """Adds a request that ends after `room` tokens; prompts given by their length share no token with others."""
    prompt = [1000 * ord(name[0]) + i for i in range(length)] if isinstance(length, int) else length
    request = Request(name, None, prompt, SamplingParams(max_tokens=room), room, **values)
    s.add(request)
    return request


def run(s: Scheduler) -> list[tuple[str, int, int, bool]]:
    """One step in which every drawn token is its position; what was computed."""
    step = s.schedule()
    sampled = [Sampled(scheduled.request.num_tokens) for scheduled in step if scheduled.samples]
    done = [(x.request.request_id, x.begin, x.count, x.samples) for x in step]
    s.update(step, sampled)
    s.check()
    return done


def test_a_request_is_prefilled_then_decoded_and_gives_its_pages_back() -> None:
    s = scheduler()
    a = add(s, "a", 6)
    assert s.has_work and (s.num_waiting, s.num_running) == (1, 0)
    assert run(s) == [("a", 0, 6, True)]
    assert (s.num_waiting, s.num_running, len(a.block_ids)) == (0, 1, 2)
    assert s.kv_cache_usage == pytest.approx(2 / 64)
    assert [run(s) for _ in range(3)] == [[("a", 6, 1, True)], [("a", 7, 1, True)], [("a", 8, 1, True)]]
    assert a.output_token_ids == [6, 7, 8, 9] and a.block_ids == []
    assert not s.has_work and s.kv_cache_usage == 0 and s.schedule() == ()


def test_a_long_prompt_is_taken_in_chunks_beside_decodes() -> None:
    s = scheduler(max_num_batched_tokens=8)
    add(s, "a", 3, room=9)
    add(s, "b", 14)
    assert run(s) == [("a", 0, 3, True), ("b", 0, 5, False)]
    assert run(s) == [("a", 3, 1, True), ("b", 5, 7, False)]
    add(s, "c", 9)
    assert run(s) == [("a", 4, 1, True), ("b", 12, 2, True), ("c", 0, 5, False)]
    assert run(s) == [("a", 5, 1, True), ("b", 14, 1, True), ("c", 5, 4, True)]


def test_places_are_limited_and_given_in_the_order_of_coming() -> None:
    s = scheduler(max_num_seqs=2)
    for name in "abc":
        add(s, name, 2, room=2)
    assert run(s) == [("a", 0, 2, True), ("b", 0, 2, True)]
    assert [r.request_id for r in s.waiting] == ["c"]
    run(s)
    assert run(s) == [("c", 0, 2, True)]


def test_no_more_run_than_a_step_has_tokens() -> None:
    s = scheduler(max_num_batched_tokens=2)
    for name in "abc":
        add(s, name, 1, room=3)
    assert [run(s) for _ in range(4)] == [
        [("a", 0, 1, True), ("b", 0, 1, True)],
        [("a", 1, 1, True), ("b", 1, 1, True)],
        [("a", 2, 1, True), ("b", 2, 1, True)],
        [("c", 0, 1, True)],
    ]


def test_a_request_waits_until_all_it_has_would_fit() -> None:
    s = scheduler(num_blocks=4, max_num_batched_tokens=6)
    add(s, "a", 5, room=3)
    add(s, "b", 12, room=1)  # 3 pages; its first chunk would fit at once
    assert run(s) == [("a", 0, 5, True)]
    run(s), run(s)
    assert run(s) == [("b", 0, 6, False)]


def test_the_last_is_preempted_waits_first_and_is_computed_again_with_its_tokens() -> None:
    s = scheduler(num_blocks=4)
    a, b = add(s, "a", 6, room=8), add(s, "b", 6, room=8)
    add(s, "c", 2)
    assert run(s) == [("a", 0, 6, True), ("b", 0, 6, True)]
    run(s), run(s)
    # Positions 8 need a third page each: b gives its own up, and c, though it would fit, must not pass it.
    assert run(s) == [("a", 8, 1, True)]
    assert s.preemptions == 1 and [r.request_id for r in s.waiting] == ["b", "c"]
    assert (b.num_computed_tokens, b.block_ids, b.output_token_ids) == (0, [], [6, 7, 8])
    while a.finish_reason is None:
        assert [x[0] for x in run(s)] == ["a"]
    assert run(s) == [("b", 0, 9, True), ("c", 0, 2, True)]
    assert b.output_token_ids == [6, 7, 8, 9]


def test_the_one_being_scheduled_is_preempted_only_if_it_is_the_last() -> None:
    s = scheduler(num_blocks=4)
    add(s, "a", 4, room=13), add(s, "b", 3, room=8), add(s, "c", 3, room=8)
    assert [x[0] for x in run(s)] == ["a", "b", "c"]
    assert [x[0] for x in run(s)] == ["a", "b", "c"]  # a takes the last page
    assert [x[0] for x in run(s)] == ["a", "b"]  # b takes c's
    assert [r.request_id for r in s.running] == ["a", "b"]
    for _ in range(2):
        assert [x[0] for x in run(s)] == ["a", "b"]
    assert [x[0] for x in run(s)] == ["a"]  # a takes b's
    assert [r.request_id for r in s.waiting] == ["b", "c"] and s.preemptions == 2


def test_what_could_never_finish_is_refused() -> None:
    s = scheduler(num_blocks=4)  # 16 positions, and the last token needs none
    with pytest.raises(UserError, match="max_tokens = 12: after 6 prompt tokens must be at most 11, .* max_model_len"):
        add(s, "a", 6, room=12)
    with pytest.raises(UserError, match="prompt = 17 tokens: must be at most 16, .*kv_cache_memory_bytes"):
        add(s, "a", 17, room=1)
    assert not s.has_work
    a = add(s, "a", 6, room=11)
    while s.has_work:
        assert run(s)
    assert len(a.output_token_ids) == 11


def test_an_id_is_served_once_at_a_time() -> None:
    s = scheduler()
    first = add(s, "a", 2, room=1)
    add(s, "a", 2, index=1)
    with pytest.raises(UserError, match="request_id = 'a': must be unused"):
        add(s, "a", 2)
    run(s)
    assert first.finish_reason == "length"
    add(s, "a", 2)


def test_the_queue_is_bounded_but_not_for_the_preempted() -> None:
    s = scheduler(num_blocks=4, max_waiting=1)
    add(s, "a", 6, room=8)
    with pytest.raises(WaitingQueueFull, match="max_waiting = 1"):
        add(s, "b", 6, room=8)
    run(s)
    add(s, "b", 6, room=8)
    run(s), run(s), run(s)
    assert s.preemptions == 1 and s.num_waiting == 1
    add(s, "c", 2)
    assert [r.request_id for r in s.waiting] == ["b", "c"]
    with pytest.raises(WaitingQueueFull):
        add(s, "d", 2)
    assert [r.request_id for r in s.waiting] == ["b", "c"]


def test_abort_ends_all_of_an_id_wherever_they_are() -> None:
    s = scheduler(max_num_seqs=3)
    one, two = add(s, "a", 5), add(s, "a", 5, index=1)
    other = add(s, "b", 5)
    waits = add(s, "a", 5, index=2)
    run(s)
    assert s.abort("a") == [one, two, waits]
    assert [r.finish_reason for r in (one, two, waits, other)] == ["abort", "abort", "abort", None]
    s.check()
    assert s.running == [other] and s.num_waiting == 0 and s.pool.num_free == 64 - len(other.block_ids)
    assert s.abort("a") == [] and s.abort("never came") == []
    while s.has_work:
        run(s)
    assert other.output_token_ids == [5, 6, 7, 8]


def test_tokens_of_a_request_aborted_during_its_step_are_dropped() -> None:
    s = scheduler(prefix_caching=True)
    a, b = add(s, "a", 5), add(s, "b", 5)
    step = s.schedule()
    s.abort("a")
    again = add(s, "a", 5)
    s.update(step, [Sampled(70), Sampled(71)])
    s.check()
    assert (a.output_token_ids, b.output_token_ids, again.output_token_ids) == ([], [71], [])
    assert run(s) == [("b", 5, 1, True), ("a", 0, 5, True)]  # and nothing of it is found: it may not be computed


def test_a_request_that_ended_by_itself_gives_its_pages_back_too() -> None:
    s = scheduler()
    a = add(s, "a", 5)
    run(s)
    a.abort()
    run(s)
    assert not s.has_work and s.pool.num_free == 64 and a.output_token_ids == [5]


def test_equal_beginnings_share_pages_and_at_least_the_last_token_is_computed() -> None:
    s = scheduler(prefix_caching=True)
    a = add(s, "a", list(range(8)))
    run(s)
    b, c, d = add(s, "b", list(range(8))), add(s, "c", [*range(8), 99]), add(s, "d", [0, 1, 2, 3, 9, 5, 6, 7, 8])
    assert run(s)[1:] == [("b", 4, 4, True), ("c", 8, 1, True), ("d", 4, 5, True)]
    assert a.block_ids[0] == b.block_ids[0] == c.block_ids[0] == d.block_ids[0]
    assert a.block_ids[1] == c.block_ids[1] and len({a.block_ids[1], b.block_ids[1], d.block_ids[1]}) == 3
    assert (s.prefix_queries_tokens, s.prefix_hits_tokens) == (8 + 8 + 9 + 9, 4 + 8 + 4)


def test_pages_of_ended_requests_are_found_their_continuation_too() -> None:
    s = scheduler(prefix_caching=True)
    a = add(s, "a", 6, room=4)
    while s.has_work:
        run(s)
    add(s, "b", [*a.all_token_ids, 7, 7])
    assert run(s) == [("b", 8, 4, True)]  # 9 positions of a were computed: two full pages


def test_another_salt_shares_nothing() -> None:
    s = scheduler(prefix_caching=True)
    add(s, "a", list(range(9)), cache_salt=b"one")
    run(s)
    add(s, "b", list(range(9)), cache_salt=b"two")
    add(s, "c", list(range(9)), cache_salt=b"one")
    assert run(s)[1:] == [("b", 0, 9, True), ("c", 8, 1, True)]


def test_only_what_was_computed_is_shared() -> None:
    s = scheduler(prefix_caching=True, max_num_batched_tokens=6)
    add(s, "a", list(range(13)), room=1), add(s, "b", list(range(13)), room=1)
    assert run(s) == [("a", 0, 6, False)]
    assert run(s) == [("a", 6, 6, False)]
    assert run(s) == [("a", 12, 1, True), ("b", 12, 1, True)]


def test_a_preempted_request_finds_its_pages_again() -> None:
    s = scheduler(num_blocks=5, prefix_caching=True)
    a, b = add(s, "a", 6, room=8), add(s, "b", 9, room=8)
    while a.finish_reason is None:
        run(s)
    assert s.preemptions >= 1
    known = b.num_tokens
    (resumed,) = run(s)
    assert resumed[1] > 0 and resumed[1] + resumed[2] == known
    assert s.prefix_hits_tokens == 0  # its own pages are no shared ones
    while s.has_work:
        run(s)
    assert b.output_token_ids == list(range(9, 17))


def test_pages_found_free_are_not_counted_twice() -> None:
    s = scheduler(num_blocks=4, prefix_caching=True)
    add(s, "a", list(range(8)), room=1)
    run(s)
    add(s, "b", 5, room=3)
    run(s)
    # The two free pages are those that held a: both would be shared, and none is left for the third.
    add(s, "c", [*range(8), 8], room=1)
    assert [x[0] for x in run(s)] == ["b"]
    assert [x[0] for x in run(s)] == ["b"]
    assert run(s) == [("c", 8, 1, True)]
    assert s.preemptions == 0


def test_without_caching_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr("moeforge.serve.prefix_cache.sha256", refuse)
    s = scheduler(num_blocks=5)
    add(s, "a", list(range(8))), add(s, "b", list(range(8)))
    while s.has_work:
        run(s)
    assert s.prefix_queries_tokens == 0
