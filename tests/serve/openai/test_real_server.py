"""`moeforge serve` as users run it: a real process, a small real model, the real openai client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai

from moeforge.serve import LLM, SamplingParams

Saved = Callable[[str], Path]
PROMPTS = [[1 + i % 250, 7 + i % 11, 3 + i // 250] for i in range(500)]
TOKENS = 12


class Running(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=240, **options)


@contextmanager
def running(model: Path, *options: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "moeforge", "serve", str(model), "--port", "0", "--json", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--dtype", "fp32", "--served-model-name", "small", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read().decode()
            yield Running(json.loads(line)["url"], process)
        finally:
            if process.poll() is None:
                process.kill()


async def stream(client: openai.AsyncOpenAI, prompt: list[int], max_tokens: int = TOKENS) -> str:
    parts = []
    answer = await client.completions.create(
        model="small",
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in answer:
        parts += [choice.text for choice in chunk.choices]
    return "".join(parts)


def solo_answers(model: Path, prompts: list[list[int]]) -> list[str]:
    llm = LLM(model, dtype="fp32", device="cpu")
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return [llm.generate(prompt, params)[0].outputs[0].text for prompt in prompts]


def test_500_clients_at_once_each_get_the_answer_they_would_get_alone(saved: Saved) -> None:
    model = saved("mixtral")

    async def all_at_once(server: Running) -> list[str]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with server.client(http_client=httpx.AsyncClient(limits=limits, timeout=240)) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS))

    with running(model, "--max-num-seqs", "64") as server:
        answers = asyncio.run(all_at_once(server))
        assert httpx.get(f"{server.url}/health").status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    sample = range(0, 500, 17)
    assert [answers[i] for i in sample] == solo_answers(model, [PROMPTS[i] for i in sample])
    assert len(answers) == 500 and all(answers)
    generated = next(line for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total{"))
    assert float(generated.split()[-1]) == 500 * TOKENS


def test_a_short_queue_refuses_the_rest_and_goes_on(saved: Saved) -> None:
    async def burst(server: Running) -> list[Any]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with server.client(http_client=httpx.AsyncClient(limits=limits, timeout=240)) as client:
            return await asyncio.gather(
                *(stream(client, prompt, 40) for prompt in PROMPTS[:120]), return_exceptions=True
            )

    with running(saved("llama"), "--max-num-seqs", "4", "--max-waiting", "16") as server:
        outcomes = asyncio.run(burst(server))
        refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
        answered = [o for o in outcomes if isinstance(o, str)]
        assert len(refused) + len(answered) == 120
        assert len(answered) >= 20 and refused
        assert all(int(o.response.headers["retry-after"]) >= 1 for o in refused)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert asyncio.run(burst_of_one(server))


async def burst_of_one(server: Running) -> str:
    async with server.client() as client:
        return await stream(client, PROMPTS[0])


def test_a_killed_rank_ends_every_stream_and_the_server(saved: Saved) -> None:
    """kill -9 of a worker: every stream ends with an error, the process with code 1, and soon."""

    async def with_a_kill(server: Running) -> list[Any]:
        async with server.client() as client:
            streams = [asyncio.create_task(stream(client, prompt, 80)) for prompt in PROMPTS[:3]]
            await asyncio.sleep(0.5)
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            return await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 30)

    with running(saved("mixtral"), "--tp", "2") as server:
        begin = time.monotonic()
        outcomes = asyncio.run(with_a_kill(server))
        assert server.process.wait(20) == 1
        assert time.monotonic() - begin < 40
        assert server.process.stderr is not None
        assert b"rank 1" in server.process.stderr.read()
    assert all(isinstance(o, str | openai.APIError | httpx.HTTPError) for o in outcomes)
    assert any(isinstance(o, Exception) for o in outcomes)


def test_running_streams_finish_at_sigterm(saved: Saved) -> None:
    async def with_a_signal(server: Running) -> str:
        async with server.client() as client:
            answer = asyncio.create_task(stream(client, PROMPTS[0], 60))
            await asyncio.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            return await answer

    with running(saved("llama")) as server:
        assert asyncio.run(with_a_signal(server))
        assert server.process.wait(30) == 0
