from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from moeforge.bench import serve_process
from moeforge.bench.serve_load import Load, Sample, arrivals, report, summary
from moeforge.errors import RunError

Answer = Callable[[dict[str, Any], Callable[[Any], None]], int]


def test_arrivals_are_poisson_and_repeat() -> None:
    times = arrivals(4.0, 20_000, seed=3)
    assert times == arrivals(4.0, 20_000, seed=3) != arrivals(4.0, 20_000, seed=4)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0 and times[-1] / len(times) == pytest.approx(0.25, rel=0.03)
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.05)  # exponential gaps


def test_percentiles() -> None:
    assert summary([]) is None
    assert summary([i / 1000 for i in range(101)]) == pytest.approx({"mean": 50, "p50": 50, "p90": 90, "p99": 99})


def test_a_report_counts_from_when_a_request_was_due() -> None:
    samples = [
        Sample(due=1.0, pieces=[1.5, 1.6, 1.8], end=1.9, tokens=3),
        Sample(due=2.0, pieces=[2.1], end=2.2, tokens=1),
        Sample(due=3.0, pieces=[3.1], error="HTTP 429: full"),
    ]
    made = report(samples, seconds=4.0)
    assert (made["requests"], made["errors"], made["error_messages"]) == (3, 1, ["HTTP 429: full"])
    assert made["output_tokens_per_second"] == 1.0 and made["requests_per_second"] == 0.5
    assert made["ttft_ms"]["mean"] == pytest.approx(300) and made["ttft_ms"]["p50"] == pytest.approx(300)
    assert made["inter_token_ms"]["mean"] == pytest.approx(150)
    assert made["end_to_end_ms"]["p99"] == pytest.approx(893)  # of 200 and 900


@pytest.fixture
def serving() -> Iterator[Callable[[Answer], str]]:
    """A small HTTP server that streams what a function says; what was asked lies in its `bodies`."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> str:
            class Handler(BaseHTTPRequestHandler):
                def log_message(self, *args: object) -> None: ...

                def do_GET(self) -> None:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(json.dumps({"data": [{"id": "tiny"}]}).encode())

                def do_POST(self) -> None:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    body["key"] = self.headers.get("Authorization")
                    events: list[Any] = []

                    def send(event: Any) -> None:
                        if not events:
                            self.send_response(200)
                            self.end_headers()
                        events.append(event)
                        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

                    status = answer(body, send)
                    if not events:
                        self.send_response(status)
                        self.end_headers()
                        self.wfile.write(b"the queue is full")
                    else:
                        self.wfile.write(b"data: [DONE]\n\n")

            httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=httpd.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(httpd.server_close)
            stack.callback(httpd.shutdown)
            return f"http://127.0.0.1:{httpd.server_address[1]}/"

        yield start


def test_clients_measure_what_a_server_streams(serving: Callable[[Answer], str]) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any], send: Callable[[Any], None]) -> int:
        bodies.append(body)
        time.sleep(0.05)
        for _ in range(3):
            send({"choices": [{"text": "a"}]})
            time.sleep(0.02)
        send({"choices": [], "usage": {"completion_tokens": 3}})
        return 200

    load = Load(serving(answer), 50, prompt_tokens=7, new_tokens=3, api_key="secret")
    assert load.model == "tiny"
    for made in (load.open_loop(rate=200.0, requests=5), load.closed_loop(concurrency=2, requests=5)):
        assert (made["requests"], made["errors"], made["output_tokens"]) == (5, 0, 15)
        assert made["ttft_ms"]["p50"] >= 50 and made["end_to_end_ms"]["p50"] >= 90
        assert 10 < made["inter_token_ms"]["p50"] < 200
    assert made["concurrency"] == 2 and len(bodies) == 12  # and a warm-up before each
    assert all(len(body["prompt"]) == 7 and body["key"] == "Bearer secret" for body in bodies)
    assert len({tuple(body["prompt"]) for body in bodies}) == 6
    assert bodies[0]["max_tokens"] == 3 and bodies[0]["ignore_eos"] and bodies[0]["stream"]


def test_errors_are_counted_not_raised(serving: Callable[[Answer], str]) -> None:
    asked = iter(range(100))

    def answer(body: dict[str, Any], send: Callable[[Any], None]) -> int:
        match next(asked) % 3:
            case 0:
                return 429
            case 1:
                send({"choices": [{"text": "a"}]})
                send({"error": {"message": "the engine died"}})
            case 2:
                send({"choices": [{"text": "a"}]})
        return 200

    made = Load(serving(answer), 50, 7, 3).closed_loop(concurrency=1, requests=6)
    assert made["errors"] == 6 and made["ttft_ms"] is None
    assert [message[:12] for message in made["error_messages"]] == ["HTTP 429: th", "the stream e", "{'message': "]


def test_nobody_there() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(RunError, match="serves no model"):
            Load(f"http://127.0.0.1:{bound.getsockname()[1]}", 50, 7, 3)


def test_a_server_process_lasts_as_long_as_its_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moeforge").mkdir()
    (tmp_path / "moeforge" / "__init__.py").touch()
    (tmp_path / "moeforge" / "__main__.py").write_text(
        "import http.server, json, sys\n"
        "if sys.argv[2] == 'bad': sys.exit('moeforge: error: no such model')\n"
        "server = http.server.HTTPServer(('127.0.0.1', int(sys.argv[4])), http.server.BaseHTTPRequestHandler)\n"
        "print(json.dumps({'url': f'http://127.0.0.1:{server.server_address[1]}', 'asked': sys.argv}), flush=True)\n"
        "server.serve_forever()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with serve_process.server(["model"]) as url:
        assert httpx.get(url).status_code == 501  # it answers: it knows no GET
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    with (
        pytest.raises(RunError, match="the server ended: moeforge: error: no such model"),
        serve_process.server(["bad"]),
    ):
        pass
