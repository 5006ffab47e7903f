"""`moeforge serve` as users run it: a real process, a small real model, the real openai client."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx
import openai
import pytest

from moeforge.serve import LLM, SamplingParams

from .test_hostile import _check, _mutants

Saved = Callable[[str], Path]
CLIENTS = 500
TOKENS = 5
DIFFERENT = 100  # requests; others ask the same again
PROMPTS = [[1 + i % DIFFERENT, 7 + i % DIFFERENT % 11, 3] for i in range(CLIENTS)]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": i % DIFFERENT} if i % 2 else {"temperature": 0} for i in range(CLIENTS)
]
HOSTILE_CLIENTS = 2


class Running(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    def client(self) -> openai.AsyncOpenAI:
        """As many connections as there are requests."""
        http: Any = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=240, trust_env=False)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", trust_env=False, timeout=20)

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def said(self) -> str:
        """What it has written to stderr."""
        self.errors.seek(0)
        return self.errors.read().decode()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.said()


@contextmanager
def running(model: Path, *options: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "moeforge", "serve", str(model), "--port", "0", "--json", "--device", "cpu"]
    command += ["--dtype", "fp32", "--served-model-name", "tiny", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            started = Running(json.loads(line)["url"] if line else "", process, errors)
            assert line, started.said()
            yield started
        finally:
            if process.poll() is None:
                process.kill()


class Answer(NamedTuple):
    text: str
    logprobs: list[float | None]
    finish_reason: str | None


async def stream(
    client: openai.AsyncOpenAI,
    prompt: list[int],
    max_tokens: int = TOKENS,
    begun: asyncio.Event | None = None,
    **sampling: Any,
) -> Answer:
    """A whole streamed answer; `begun` is set at its first piece."""
    text, finish_reason = "", None
    logprobs: list[float | None] = []
    chunks = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=max_tokens,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True},
        **({"temperature": 0} | sampling),
    )
    async for chunk in chunks:
        if begun is not None:
            begun.set()
        for choice in chunk.choices:
            text += choice.text
            if choice.logprobs is not None:
                logprobs += choice.logprobs.token_logprobs or []
            finish_reason = choice.finish_reason or finish_reason
    return Answer(text, logprobs, finish_reason)


def solo_answers(model: Path) -> list[Answer]:
    llm = LLM(model, dtype="fp32", device="cpu", deterministic=True)
    answers = []
    for prompt, sampling in zip(PROMPTS[:DIFFERENT], SAMPLING[:DIFFERENT], strict=True):
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=0, **sampling)
        (output,) = llm.generate(prompt, params)[0].outputs
        answers.append(Answer(output.text, [s.logprob for s in output.logprobs or []], output.finish_reason))
    llm.close()
    return answers


def test_500_clients_at_once_each_get_the_answer_they_would_get_alone(saved: Saved) -> None:
    model = saved("mixtral")

    async def all_at_once(server: Running) -> list[Answer]:
        async with AsyncExitStack() as stack:  # a pool that is much larger is slow itself
            pools = [await stack.enter_async_context(server.client()) for _ in range(25)]
            requests = zip(cycle(pools), PROMPTS, SAMPLING)
            return await asyncio.gather(*(stream(client, prompt, **sampling) for client, prompt, sampling in requests))

    with running(model, "--max-num-seqs", "64", "--deterministic") as server:
        answers = asyncio.run(all_at_once(server))  # raises where one is refused
        assert server.get("/health").status_code == 200
        metrics = server.get("/metrics").text
        server.stop()
    generated = next(line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total{"))
    assert float(generated.split()[-1]) == CLIENTS * TOKENS
    assert all(len(answer.logprobs) == TOKENS for answer in answers)
    alone = solo_answers(model)
    assert not [i for i, answer in enumerate(answers) if answer != alone[i % DIFFERENT]]


def test_a_short_queue_refuses_the_rest_and_goes_on(saved: Saved) -> None:
    async def burst(server: Running) -> list[Any]:
        async with server.client() as client:
            return await asyncio.gather(
                *(stream(client, prompt, 40) for prompt in PROMPTS[:100]), return_exceptions=True
            )

    async def one(server: Running) -> Answer:
        async with server.client() as client:
            return await stream(client, PROMPTS[0], 40)

    with running(saved("llama"), "--max-num-seqs", "4", "--max-waiting", "16", "--deterministic") as server:
        outcomes = asyncio.run(burst(server))
        refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
        answered = [o for o in outcomes if isinstance(o, Answer)]
        assert len(refused) + len(answered) == 100
        assert len(answered) >= 20 and refused
        assert all(len(o.logprobs) == 40 and o.finish_reason == "length" for o in answered)
        assert all(int(o.response.headers["retry-after"]) >= 1 for o in refused)
        assert server.get("/health").status_code == 200
        assert server.get("/stats").json()["kv_cache_usage"] == 0
        again = asyncio.run(one(server))
        assert again.finish_reason == "length" and outcomes[0] in (again, *refused)


def test_a_killed_rank_ends_every_stream_and_the_server(saved: Saved) -> None:
    """kill -9 of a worker: what runs or waits ends with an error, and the server with code 1."""

    async def with_a_kill(server: Running) -> list[Any]:
        async with server.client() as client:
            begun = [asyncio.Event() for _ in range(40)]
            requests = zip(PROMPTS[:40], begun, strict=True)
            streams = [asyncio.create_task(stream(client, prompt, 90, event)) for prompt, event in requests]
            await asyncio.wait(
                [asyncio.create_task(event.wait()) for event in begun], timeout=30, return_when="FIRST_COMPLETED"
            )
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            return await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 30)

    with running(saved("mixtral"), "--tp", "2", "--max-num-seqs", "4") as server:
        outcomes = asyncio.run(with_a_kill(server))
        with suppress(httpx.TransportError):  # where it is gone already
            assert server.get("/health").status_code == 503
        assert server.process.wait(20) == 1
        error = server.said()
        assert error.startswith("moeforge: error: the engine failed: rank 1 ") and error.count("\n") == 1
    broken = [o for o in outcomes if isinstance(o, openai.APIError | httpx.HTTPError)]
    whole = [o for o in outcomes if isinstance(o, Answer) and (o.finish_reason, len(o.logprobs)) == ("length", 90)]
    assert len(broken) + len(whole) == 40 and len(broken) >= 30


@pytest.mark.slow  # as the life of a server in tests/cli, with another client
def test_running_streams_finish_at_sigterm(saved: Saved) -> None:
    async def with_a_signal(server: Running) -> Answer:
        async with server.client() as client:
            begun = asyncio.Event()
            answer = asyncio.create_task(stream(client, PROMPTS[0], 90, begun))
            await asyncio.wait_for(begun.wait(), 30)
            server.process.send_signal(signal.SIGTERM)
            return await answer

    with running(saved("llama")) as server:
        assert len(asyncio.run(with_a_signal(server)).logprobs) == 90
        assert server.process.wait(30) == 0


def legal(reply: httpx.Response) -> None:
    """An answer with status 200 is whole: choices, or a stream to its end."""
    reply.read()
    if reply.status_code != 200:
        return
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text, reply.text[-300:]
    else:
        assert reply.json()["choices"], reply.text[:300]


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_hostile_requests_harm_no_one_else(saved: Saved, count: int) -> None:
    def hostile(server: Running, seed: int) -> None:
        with httpx.Client(base_url=server.url, timeout=20, trust_env=False, event_hooks={"response": [legal]}) as http:
            for path, raw in _mutants(seed, count // HOSTILE_CLIENTS + 1):
                _check(http, path, raw, True)

    def good(http: httpx.Client) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        begin = time.monotonic()
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == 200 and time.monotonic() - begin < 10
        return dict(reply.json()["choices"][0])

    def keep_asking(server: Running, over: threading.Event) -> int:
        asked = 0
        with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as http:
            first = good(http)
            while not over.is_set():
                assert good(http) == first
                asked += 1
        return asked

    with running(saved("llama"), "--deterministic") as server, ThreadPoolExecutor(HOSTILE_CLIENTS + 1) as threads:
        with httpx.Client(base_url=server.url, timeout=20, trust_env=False) as http:
            good(http)
        before, over = server.resident_bytes(), threading.Event()
        asking = threads.submit(keep_asking, server, over)
        try:
            for attack in [threads.submit(hostile, server, seed) for seed in range(HOSTILE_CLIENTS)]:
                attack.result()
        finally:
            over.set()
        assert asking.result() >= count // 100
        assert server.resident_bytes() - before < 200_000_000
        assert server.get("/health").status_code == 200
        server.stop()
        assert "Traceback" not in server.said()
