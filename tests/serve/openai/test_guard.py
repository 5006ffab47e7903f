"""Keys, hosts, origins, and how much may be sent how slowly."""

from __future__ import annotations

import contextlib
import gc
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request

from moeforge.errors import UserError
from moeforge.serve.openai.guard import cache_salt
from moeforge.serve.openai.settings import is_loopback, others_may_read, read_keys

KEYS = (b"first-key", b"second-key")
GUARDED = ("/", "/page.js", "/page.css", "/metrics", "/stats", "/version", "/v1/models", "/v1/embeddings", "/nowhere")


def test_the_key_guards_all_but_health(serve: Any) -> None:
    served = serve(keys=KEYS)
    for key in (None, "wrong", "first-ke", "first-key2", "FIRST-KEY"):
        with served.http(key) as http:
            assert http.get("/health").status_code == 200
            for path in GUARDED:
                reply = http.get(path)
                assert reply.status_code == 401, path
                assert reply.json()["error"]["code"] == "invalid_api_key"
            assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        served.openai("wrong").models.list()
    for key in ("first-key", "second-key"):
        assert served.openai(key).models.list().data[0].id == "tiny"
        with served.http(key) as http:
            assert {http.get(path).status_code for path in GUARDED[:7]} == {200}


def test_browsers_are_asked_for_the_key(serve: Any) -> None:
    served = serve(keys=KEYS)
    with served.http() as http:
        assert http.get("/").headers["www-authenticate"].startswith("Basic ")
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        for auth, status in ((("any", "second-key"), 200), (("second-key", ""), 401), (("any", "x"), 401)):
            assert http.get("/", auth=auth).status_code == status
        assert http.get("/metrics", auth=("prometheus", "first-key")).status_code == 200
        for header in ("Basic", "Basic %%%", "Basic " + "A" * 999, "Digest first-key", "first-key", "Bearer"):
            assert http.get("/", headers={"Authorization": header}).status_code == 401
        assert http.get("/", headers={b"Authorization": b"Bearer \xff\xfe"}).status_code == 401


def test_prefixes_are_shared_only_within_a_tenant(serve: Any) -> None:
    served = serve(keys=KEYS)
    for key, salt in (("first-key", None), ("first-key", None), ("first-key", "s"), ("second-key", None)):
        served.openai(key).completions.create(
            model="tiny", prompt="a", max_tokens=1, extra_body={"cache_salt": salt} if salt else {}
        )
    salts = [one["salt"] for one in served.engine.submitted]
    assert salts[0] == salts[1] == cache_salt(b"first-key", None) and len(set(salts)) == 3


def test_only_known_hosts(shared: Any, serve: Any) -> None:
    with shared.http() as http:
        for host, status in (
            ("localhost", 200), ("127.0.0.1:99", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200), ("[::1]", 200),
            ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403), ("", 403), ("::1", 403),
        ):  # fmt: skip
            assert http.get("/health", headers={"Host": host}).status_code == status, host
    with serve(allowed_hosts=("my.proxy",)).http() as http:
        assert http.get("/health", headers={"Host": "my.proxy"}).status_code == 200
        assert http.get("/health", headers={"Host": "localhost"}).status_code == 403
    with serve(allowed_hosts=None).http() as http:
        assert http.get("/health", headers={"Host": "any.thing"}).status_code == 200


def test_forms_of_other_sites_cannot_post(shared: Any) -> None:
    with shared.http() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
            headers = {} if kind is None else {"Content-Type": kind}
            reply = http.post("/v1/completions", content='{"prompt": "a"}', headers=headers)
            assert reply.status_code == 415
        reply = http.options(
            "/v1/completions", headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
        )
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_body_that_is_too_long(serve: Any) -> None:
    served = serve(max_body_bytes=100_000)
    with served.http() as http:
        with pytest.raises(openai.APIStatusError) as caught:
            served.openai().completions.create(model="tiny", prompt="a" * 3_000_000)
        assert caught.value.status_code == 413
        chunks = iter([b"x" * 50_000] * 4)  # no Content-Length
        reply = http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
        assert reply.status_code == 413 and reply.json()["error"]["message"] == "body: is longer than 100000 bytes"
        assert http.get("/health").status_code == 200


def test_an_endless_body_is_cut(serve: Any) -> None:
    served = serve(max_body_bytes=1000)
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    with served.http() as http:
        try:
            reply = http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
            assert reply.status_code == 413
        except httpx.TransportError:
            pass  # closed while we still write
        assert sent < 64 << 20
        assert http.get("/health").status_code == 200


def test_all_bodies_together_are_bounded(serve: Any) -> None:
    served = serve(max_bodies_bytes=50_000)
    with served.http() as http:
        reply = http.post("/v1/completions", json={"prompt": "a" * 60_000})
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def _connect(served: Any) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    return sock


def test_a_slow_body_and_slow_headers_are_cut(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeforge.serve.openai.server._HEADER_SECONDS", 0.3)
    served = serve(body_timeout_seconds=0.3)
    begin = time.monotonic()
    with _connect(served) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 408 ")
    with _connect(served) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert sock.recv(4096) == b""
    with _connect(served) as sock:
        assert sock.recv(4096) == b""
    with _connect(served) as sock:  # a second request on a connection that is kept open
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                reply += sock.recv(4096)
            time.sleep(0.5)
    assert time.monotonic() - begin < 8


def test_long_headers_are_refused(shared: Any) -> None:
    with _connect(shared) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n")
        assert sock.recv(4096)[:10] in (b"HTTP/1.1 4", b"")
    with shared.http() as http:
        assert http.get("/health").status_code == 200


def test_keys_of_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEFORGE_API_KEY", raising=False)
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \none\n")
    file.chmod(0o600)
    assert read_keys(file) == (b"one", b"two") and not others_may_read(file)
    file.chmod(0o644)
    assert others_may_read(file)
    monkeypatch.setenv("MOEFORGE_API_KEY", "three")
    assert read_keys(file) == (b"one", b"two", b"three") and read_keys(None) == (b"three",)
    monkeypatch.delenv("MOEFORGE_API_KEY")
    for content, words in ((b"\n", "holds no key"), ("schlüssel".encode(), "printable"), (b"a b", "printable")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_keys(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_keys(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_which_hosts_are_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "0.0.0.0", "::", "10.0.0.1")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(UserError, match="--host not a host"):
        is_loopback("not a host")


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_is_dropped_once_it_is_understood(serve: Any, stream: bool) -> None:
    served = serve(max_bodies_bytes=50_000)
    served.engine.step_seconds = 0.05
    body = {"prompt": "a", "user": "u" * 30_000, "max_tokens": 60, "stream": stream}
    with ThreadPoolExecutor(1) as pool, served.http() as http:
        first = pool.submit(http.post, "/v1/completions", json=body)
        served.eventually(lambda: len(served.engine.running) == 1)
        assert http.post("/v1/completions", json=body | {"max_tokens": 1}).status_code == 200
        assert not first.done()
        assert not any(len(getattr(one, "_body", b"")) > 1000 for one in gc.get_objects() if type(one) is Request)
        served.engine.step_seconds = 0.0
        assert first.result().status_code == 200
