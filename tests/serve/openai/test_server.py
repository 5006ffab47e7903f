"""The life of a server: full queue, clients that go, graceful end, an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moeforge.errors import RunError, UserError
from moeforge.serve.async_engine import EngineHangs
from moeforge.serve.openai import server


def test_a_full_queue_is_429_with_retry_after(serve: Any) -> None:
    served = serve()
    served.engine.queue = 0
    with pytest.raises(openai.RateLimitError) as caught:
        served.openai().completions.create(model="tiny", prompt="a")
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
    served.engine.queue = 2  # the third prompt does not fit: nothing of the request stays
    with pytest.raises(openai.RateLimitError):
        served.openai().completions.create(model="tiny", prompt=["a", "b", "c"], stream=True)
    assert not served.engine.running and served.engine.reasons == {"abort": 2}


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request(serve: Any, stream: bool, prompts: list[str]) -> None:
    served = serve()
    served.engine.step_seconds = 0.01

    async def begin_and_go() -> None:
        async with httpx.AsyncClient(base_url=served.url, trust_env=False) as client:
            body = {"prompt": prompts, "max_tokens": 2000, "stream": stream}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while len(served.engine.running) < len(prompts):
                await asyncio.sleep(0.01)
            streams = list(served.engine.running)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(served.eventually, lambda: all(one.aborted for one in streams))

    asyncio.run(begin_and_go())
    with served.http() as http:
        assert http.get("/health").status_code == 200


def test_a_client_that_stops_reading_is_cut(serve: Any, tokenizer: Any) -> None:
    served = serve(write_timeout_seconds=0.3)
    served.engine.step_seconds = 0
    served.engine.text_of = lambda token: "x" * 50_000
    with served.http() as http:
        body = {"prompt": "a", "max_tokens": 2000, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            served.eventually(lambda: served.engine.reasons == {"abort": 1})


def test_a_graceful_end_finishes_what_runs(serve: Any) -> None:
    served = serve(shutdown_timeout=10)
    served.engine.step_seconds = 0.02
    stream = served.openai().completions.create(model="tiny", prompt="ab", max_tokens=60, stream=True)
    texts = [next(stream).choices[0].text]
    whole: list[Any] = []
    other = threading.Thread(
        target=lambda: whole.append(served.openai().completions.create(model="tiny", prompt="cd", max_tokens=60))
    )
    other.start()
    served.eventually(lambda: len(served.engine.running) == 2)
    with served.http() as http:
        assert http.get("/health").status_code == 200
        served.ask_to_stop()
        served.eventually(lambda: served.engine.closing)
        assert http.get("/health").status_code == 503
        assert "shutting down" in http.get("/health").json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == "ab" * 30
    other.join(10)
    assert whole[0].choices[0].text == "cd" * 30
    served.wait()
    assert served.error is None
    with pytest.raises(httpx.ConnectError), served.http() as http:
        http.get("/health")


def test_what_takes_longer_is_told_and_cut(serve: Any) -> None:
    served = serve(shutdown_timeout=0.2)
    served.engine.step_seconds = 0.05
    stream = served.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=1000, stream=True
    )
    next(stream)
    served.ask_to_stop()
    with pytest.raises(openai.APIError, match="shut down before the answer was complete"):
        list(stream)
    served.wait(8)
    assert served.error is None


def test_a_dead_engine_ends_every_stream_and_the_server(serve: Any) -> None:
    served = serve()
    served.engine.step_seconds = 0.02
    client = served.openai()
    streams = [client.completions.create(model="tiny", prompt=p, max_tokens=900, stream=True) for p in ("a", "b")]
    for stream in streams:
        next(stream)
    failures: list[openai.APIStatusError] = []

    def whole() -> None:
        try:
            served.openai().completions.create(model="tiny", prompt=["c", "d"], max_tokens=900)
        except openai.APIStatusError as error:
            failures.append(error)

    other = threading.Thread(target=whole)
    other.start()
    served.eventually(lambda: len(served.engine.running) == 4)
    begin = time.monotonic()
    served.engine.failed = "rank 1 was killed"
    for stream in streams:
        with pytest.raises(openai.APIError, match="rank 1 was killed"):
            list(stream)
    other.join(5)
    assert failures[0].status_code == 500 and "rank 1 was killed" in failures[0].message
    served.wait(8)
    assert time.monotonic() - begin < 8
    assert isinstance(served.error, RunError) and "rank 1 was killed" in str(served.error)


def test_health_tells_of_a_dead_engine(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_POLL_SECONDS", 1.0)
    served = serve()
    with served.http() as http:
        assert http.get("/health").status_code == 200
        served.engine.failed = "out of memory"
        reply = http.get("/health")
        assert reply.status_code == 503 and "out of memory" in reply.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 503


def test_a_port_in_use_and_others_that_cannot_be(serve: Any) -> None:
    served = serve()
    port = int(served.url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}: is in use on 127.0.0.1"):
        server.bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--port 65536"):
        server.bind("127.0.0.1", 65536)
    with pytest.raises(UserError, match="--host 192.0.2.1: is no address of this machine"):
        server.bind("192.0.2.1", 0)
    with server.bind("::1", 0) as sock:
        assert server.url_of(sock).startswith("http://[::1]:")


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_gives_up_is_an_error_of_that_request(serve: Any, stream: bool) -> None:
    served = serve()
    body = {"prompt": "ab", "max_tokens": 2, "stream": stream}
    with served.http() as http:
        for reason, status, words in (
            ("structured_outputs: too much", 400, "response_format: too much"),
            ("text: KeyError: 7", 500, "the request failed: text: KeyError: 7"),
        ):
            served.engine.gives_up = reason
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == (200 if stream else status) and words in reply.text
            assert "[DONE]" not in reply.text and '"finish_reason":"abort"' not in reply.text
        served.engine.fault = UserError("max_tokens = 2: does not fit")
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == (200 if stream else 400) and "max_tokens = 2: does not fit" in reply.text
    served.eventually(lambda: not served.engine.running)


def test_a_whole_answer_that_nobody_reads_is_cut(serve: Any) -> None:
    served = serve(write_timeout_seconds=0.3)
    served.engine.text_of = lambda token: "x" * 4_000_000
    host, port = served.url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "max_tokens": 8}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(2)
        received = 0
        with contextlib.suppress(ConnectionError):
            while got := len(sock.recv(1 << 20)):
                received += got
        assert received < 32_000_000
    with served.http() as http:  # one that reads slowly, but reads, gets all
        with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 8}) as reply:
            parts = []
            for part in reply.iter_raw(8_000_000):
                time.sleep(0.2)
                parts.append(part)
        assert len(b"".join(parts)) > 32_000_000


def test_an_engine_that_cannot_be_ended_ends_the_process(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve()
    codes: list[int] = []
    monkeypatch.setattr(server.os, "_exit", codes.append)

    async def hangs() -> None:
        raise EngineHangs("the engine does not stop")

    served.engine.shutdown = hangs
    served.ask_to_stop()
    served.wait()
    assert codes == [1]


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_rank_hangs(saved: Callable[[str], Path]) -> None:
    command = [
        sys.executable, "-m", "moeforge", "serve", str(saved("llama")), "--port", "0", "--json", "--device", "cpu",
        "--dtype", "fp32", "--tp", "2", "--shutdown-timeout", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            body = {"prompt": [1, 2], "max_tokens": 90, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
                lines = reply.iter_lines()
                next(lines)
                os.kill(int(children[-1]), signal.SIGSTOP)
                begin = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert "shut down before the answer was complete" in "".join(lines)
            assert process.wait(30) in (0, 1) and time.monotonic() - begin < 30
            assert not Path(f"/proc/{children[-1]}").exists()
        finally:
            process.kill()
