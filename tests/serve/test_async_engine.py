"""The engine's thread under an asyncio loop: what streams bring, and how they end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.serve import LLM, SamplingParams
from moeforge.serve.async_engine import AsyncEngine, QueueFull
from moeforge.serve.engine import Engine
from moeforge.serve.outputs import CompletionOutput
from moeforge.serve.sampling_params import StructuredOutputsParams
from moeforge.serve.stream import EngineDead, Stream

from .recording import greedy, worker_processes

Saved = Callable[[str], Path]
PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not worker_processes()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


@asynccontextmanager
async def started(model: Path, **settings: Any) -> AsyncIterator[AsyncEngine]:
    made: list[AsyncEngine] = []
    config = EngineConfig(**({"dtype": "fp32", "device": "cpu", "block_size": 4} | settings))
    engine = AsyncEngine(Engine(config, model, lambda message: made[0].fail(message)))
    made.append(engine)
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.wait_for(engine.shutdown(), 20)


def together(stream_deltas: list[Any], n: int = 1) -> list[CompletionOutput]:
    """What all deltas of a stream make up."""
    found = []
    for index in range(n):
        deltas = [delta for step in stream_deltas for delta in step if delta.index == index]
        sampled = [one for delta in deltas for one in delta.sampled]
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        text = "".join(delta.text for delta in deltas)
        last = deltas[-1]
        tokens = [one.token for one in sampled]
        found.append(CompletionOutput(index, text, tokens, last.finish_reason, last.stop_reason))
    return found


async def collect(stream: Stream) -> list[Any]:
    return [deltas async for deltas in stream]


async def quiet(engine: AsyncEngine, seconds: float = 5.0) -> None:
    """Waits until the engine has nothing to do."""
    deadline = time.monotonic() + seconds
    while engine.engine.has_work or engine._inbox:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_stream_brings_what_generate_returns(saved: Saved) -> None:
    llm = LLM(saved("mixtral"), dtype="fp32", device="cpu", block_size=4)
    for params in (
        greedy(20),
        SamplingParams(seed=3, max_tokens=30, n=3, temperature=1.2),
        SamplingParams(temperature=0, max_tokens=30, stop=["e", "\n"]),
    ):
        (expected,) = llm.generate([PROMPT], params)

        async def run(params: SamplingParams = params) -> list[Any]:
            async with started(saved("mixtral")) as engine:
                return await collect(await engine.submit("a", None, PROMPT, params))

        steps = asyncio.run(run())
        assert together(steps, params.n) == expected.outputs
        assert len(steps) == max(len(output.token_ids) for output in expected.outputs)


def test_a_hundred_streams_at_once_each_bring_their_own(saved: Saved) -> None:
    llm = LLM(saved("llama"), dtype="fp32", device="cpu", block_size=4)
    prompts = [[i % 50 + 3, *range(i % 11), i] for i in range(100)]
    params = [greedy(3 + i % 9) if i % 2 else SamplingParams(seed=i, max_tokens=3 + i % 7) for i in range(100)]
    alone = [llm.generate([prompt], one)[0].outputs for prompt, one in zip(prompts, params, strict=True)]

    async def run() -> list[list[CompletionOutput]]:
        async with started(
            saved("llama"), max_num_seqs=16, max_num_batched_tokens=40, kv_cache_memory_bytes=3072 * 40
        ) as engine:

            async def one(i: int) -> list[CompletionOutput]:
                return together(await collect(await engine.submit(str(i), None, prompts[i], params[i])))

            found = list(await asyncio.gather(*[one(i) for i in range(100)]))
            await quiet(engine)
            await asyncio.sleep(0.05)
            stats = engine.stats
            assert sum(stats.requests_by_finish_reason.values()) == 100
            assert stats.prompt_tokens == sum(map(len, prompts))
            assert stats.generation_tokens == sum(len(o.token_ids) for outputs in found for o in outputs)
            assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0)
            assert stats.prefix_queries == stats.prompt_tokens
            assert stats.preemptions == engine.engine.scheduler.preemptions > 0
            engine.engine.scheduler.check()
            return found

    assert asyncio.run(run()) == alone


def test_abort_frees_pages(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            expected = await collect(await engine.submit("first", None, PROMPT, greedy(90)))
            streams = [await engine.submit(str(i), None, [i, *PROMPT], greedy(80)) for i in range(5)]
            other = await engine.submit("other", None, PROMPT, greedy(90))
            await anext(aiter(streams[0]))
            for stream in streams:
                stream.abort()
                stream.abort()
            assert together(await collect(other)) == together(expected)
            other.abort()  # has ended
            await quiet(engine)
            scheduler = engine.engine.scheduler
            scheduler.check()
            assert scheduler.kv_cache_usage == 0
            await asyncio.sleep(0.05)
            assert engine.stats.requests_by_finish_reason == {"length": 2, "abort": 5}

    asyncio.run(run())


def test_streams_of_one_name_are_not_confused(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            expected = together(await collect(await engine.submit("x", None, PROMPT, greedy(5))))
            for _ in range(10):
                first = await engine.submit("x", None, [9, 9], greedy(90))
                await anext(aiter(first))
                first.abort()
                again = await engine.submit("x", None, PROMPT, greedy(5))
                first.abort()
                assert together(await asyncio.wait_for(collect(again), 10)) == expected

    asyncio.run(run())


def test_bad_requests_are_refused_and_the_rest_goes_on(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama"), max_num_seqs=2, max_waiting=3) as engine:
            running = await engine.submit("good", None, PROMPT, greedy(30))
            for prompt, params, message in (
                ([], greedy(), "is empty"),
                ([264], greedy(), "between 0 and 263"),
                ([1] * 96, greedy(), "at most 95"),
                (PROMPT, greedy(logit_bias={999: 1.0}), "999"),
                (PROMPT, SamplingParams(n=6), "n = 6: must be at most 5"),
            ):
                with pytest.raises(UserError, match=message):
                    await engine.submit("bad", None, prompt, params)
            assert len(await collect(running)) == 30

    asyncio.run(run())


def test_a_full_queue_refuses_and_takes_again(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with started(saved("llama"), max_num_seqs=2, max_waiting=3) as engine:
            gate = threading.Event()
            forward = engine.engine.runner.forward
            monkeypatch.setattr(engine.engine.runner, "forward", lambda batch: gate.wait(20) and forward(batch))
            # Places are free, so two more than may wait are taken, whether the engine has seen the others or not.
            streams = [await engine.submit("0", None, PROMPT, greedy(3))]
            while engine._inbox:
                await asyncio.sleep(0.01)
            streams += [await engine.submit(str(i), None, PROMPT, greedy(3)) for i in range(1, 5)]
            for _ in range(3):
                with pytest.raises(QueueFull, match="5 requests are waiting") as caught:
                    await engine.submit("more", None, PROMPT, greedy(3))
                assert caught.value.retry_after_seconds >= 1
            gate.set()
            for stream in streams:
                assert len(await collect(stream)) == 3
            assert len(await collect(await engine.submit("more", None, PROMPT, greedy(3)))) == 3

    asyncio.run(run())


def test_a_step_that_fails_ends_every_stream(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            streams = [await engine.submit(str(i), None, PROMPT, greedy(90)) for i in range(3)]
            readers = [aiter(stream) for stream in streams]
            for reader in readers:
                await anext(reader)

            def broken(_: object) -> None:
                raise ValueError("something odd")

            monkeypatch.setattr(engine.engine.runner, "forward", broken)
            for reader in readers:
                with pytest.raises(EngineDead, match="ValueError: something odd"):
                    async with asyncio.timeout(5):
                        async for _ in reader:
                            pass
            assert engine.failed == "ValueError: something odd"
            with pytest.raises(EngineDead, match="something odd"):
                await engine.submit("late", None, PROMPT, greedy(1))

    asyncio.run(run())


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_worker_ends_every_stream(saved: Saved, busy: bool) -> None:
    async def run() -> None:
        async with started(saved("llama"), tensor_parallel_size=2, max_model_len=96) as engine:
            (pid,) = worker_processes()
            streams = [await engine.submit(str(i), None, PROMPT, greedy(90)) for i in range(3)] if busy else []
            readers = [aiter(stream) for stream in streams]
            for reader in readers:
                await anext(reader)
            begin = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for reader in readers:
                with pytest.raises(EngineDead, match=r"rank 1 .* signal 9"):
                    async with asyncio.timeout(5):
                        async for _ in reader:
                            pass
            while engine.failed is None:
                assert time.monotonic() - begin < 5
                await asyncio.sleep(0.01)
            assert "signal 9" in engine.failed
            with pytest.raises(EngineDead, match="signal 9"):
                await engine.submit("late", None, PROMPT, greedy(1))

    asyncio.run(run())


def test_a_rank_that_dies_before_the_start_is_not_missed(saved: Saved) -> None:
    config = EngineConfig(dtype="fp32", device="cpu", tensor_parallel_size=2)

    async def run() -> None:
        inner = Engine(config, saved("llama"))
        (pid,) = worker_processes()
        os.kill(pid, signal.SIGKILL)
        while inner.runner.failed is None:
            await asyncio.sleep(0.01)
        engine = AsyncEngine(inner)
        engine.start()
        assert engine.failed is not None and "signal 9" in engine.failed
        with pytest.raises(EngineDead, match="signal 9"):
            await engine.submit("x", None, PROMPT, greedy(1))
        await engine.shutdown()

    asyncio.run(run())


def test_shutdown_finishes_what_runs_and_takes_nothing_more(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            streams = [await engine.submit(str(i), None, [i, *PROMPT], greedy(40)) for i in range(3)]
            collecting = [asyncio.create_task(collect(stream)) for stream in streams]
            ending = asyncio.create_task(engine.shutdown())
            await asyncio.sleep(0)
            with pytest.raises(EngineDead, match="shutting down"):
                await engine.submit("late", None, PROMPT, greedy(1))
            await asyncio.wait_for(ending, 20)
            assert [len(steps) for steps in await asyncio.gather(*collecting)] == [40, 40, 40]
            assert engine.failed is None
            with pytest.raises(EngineDead, match="shutting down"):
                await engine.submit("late", None, PROMPT, greedy(1))

    asyncio.run(run())


def test_an_idle_engine_costs_nothing(saved: Saved) -> None:
    async def run() -> float:
        async with started(saved("llama")) as engine:
            await collect(await engine.submit("x", None, PROMPT, greedy(2)))
            await quiet(engine)
            before = time.process_time()
            await asyncio.sleep(1)
            return time.process_time() - before

    assert asyncio.run(run()) < 0.1


def test_slow_schemas_hold_up_neither_other_requests_nor_each_other_for_ever(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            gate, make = threading.Event(), engine.engine.requests

            def slow(key: str, prompt: Any, ids: list[int], params: SamplingParams, salt: bytes) -> Any:
                if params.structured_outputs is not None:
                    assert gate.wait(20)
                    params = greedy(2)
                return make(key, prompt, ids, params, salt)

            monkeypatch.setattr(engine.engine, "requests", slow)
            schema = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
            asking = [asyncio.create_task(engine.submit("s", None, PROMPT, schema)) for _ in range(18)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await engine.submit("one too many", None, PROMPT, schema)
            assert len(await asyncio.wait_for(collect(await engine.submit("x", None, PROMPT, greedy(3))), 10)) == 3
            asking.pop().cancel()
            await asyncio.sleep(0.01)
            asking.append(asyncio.create_task(engine.submit("s", None, PROMPT, schema)))
            gate.set()
            for stream in await asyncio.gather(*asking):
                assert len(await collect(stream)) == 2

    asyncio.run(run())


def test_what_the_scheduler_refuses_ends_that_request_alone(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            add = engine.engine.add

            def refuses(request: Any) -> None:
                if len(request.prompt_token_ids) == 2 and request.index == 1:
                    raise UserError("max_tokens = 9: does not fit")
                add(request)

            monkeypatch.setattr(engine.engine, "add", refuses)
            other = await engine.submit("other", None, PROMPT, greedy(20))
            refused = await engine.submit("x", None, [5, 6], SamplingParams(n=3, max_tokens=90, ignore_eos=True))
            with pytest.raises(UserError, match="does not fit"):
                await asyncio.wait_for(collect(refused), 10)
            assert len(await collect(other)) == 20
            await quiet(engine)
            engine.engine.scheduler.check()
            await asyncio.sleep(0.05)
            assert engine.stats.requests_by_finish_reason == {"length": 1, "abort": 1}

    asyncio.run(run())


def test_a_fault_in_one_text_ends_that_request_alone(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            make = engine.engine.requests

            def with_fault(*arguments: Any) -> Any:
                requests = make(*arguments)
                if arguments[0].startswith("bad"):
                    requests[0]._detokenizer = object()
                return requests

            engine.engine.requests = with_fault  # type: ignore[method-assign]
            bad, good = [await engine.submit(name, None, PROMPT, greedy(9)) for name in ("bad", "good")]
            ((last,),) = await asyncio.wait_for(collect(bad), 10)
            assert last.finish_reason == "abort" and "AttributeError" in str(last.stop_reason)
            assert len(await collect(good)) == 9 and engine.failed is None

    asyncio.run(run())


def test_an_abort_with_a_reason_is_told_also_to_a_late_reader(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            stream = await engine.submit("x", None, PROMPT, greedy(90))
            stream.abort("time is up")
            with pytest.raises(EngineDead, match="time is up"):
                await asyncio.wait_for(collect(stream), 5)

    asyncio.run(run())


def test_nothing_of_a_streams_past_is_kept(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama")) as engine:
            made: list[Any] = []
            make = engine.engine.requests
            engine.engine.requests = lambda *a: made.extend(make(*a)) or made  # type: ignore[method-assign,func-returns-value]
            await collect(await engine.submit("x", None, PROMPT, greedy(20, logprobs=2)))
            assert made[0].output().text == "" and made[0].output().logprobs == []

    asyncio.run(run())


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_outlive_close(saved: Saved) -> None:
    async def run() -> None:
        async with started(saved("llama"), tensor_parallel_size=2, max_model_len=96) as engine:
            (pid,) = worker_processes()
            reader = aiter(await engine.submit("x", None, PROMPT, greedy(90)))
            await anext(reader)
            os.kill(pid, signal.SIGSTOP)
            begin = time.monotonic()
            await engine.close()
            assert time.monotonic() - begin < 20

    asyncio.run(run())
