"""Malformed and hostile requests: always a short 4xx in the error format, quickly, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

PATHS = ("/v1/completions", "/v1/chat/completions")
VALID: dict[str, dict[str, Any]] = {
    PATHS[0]: {"model": "tiny", "prompt": "a", "max_tokens": 1},
    PATHS[1]: {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop",
    "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "top_logprobs", "logit_bias", "response_format",
    "presence_penalty", "repetition_penalty", "stop_token_ids", "min_tokens", "ignore_eos", "cache_salt", "tools",
    "chat_template", "chat_template_kwargs", "echo", "best_of", "suffix", "user", "__proto__", "",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    -(2**63),
    2**64,
    10**300,
    1e308,
    -0.0,
    "",
    "a",
    "\x00",
    "\u202e\ufffe",
    "a" * 9999,
    [],
    [[]],
    [None],
    [[[]]],
    {},
    {"a": {}},
    {"type": "json_schema"},
    {"type": "json_object"},
    ["a"] * 300,
    [-1],
    [264],
    [1.0],
    [True],
    list(range(264)),
    {"0": 1},
    {"-1": 1},
    {"0": "x"},
    {"0": None},
    {"\ud800": 1},
    [{"role": "user", "content": []}],
    [{"role": "user", "content": [{}]}],
    [{"role": [], "content": {}}],
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    {"include_usage": 1},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5, "pattern": "("}}},
)
WHOLE = (
    b"",
    b" ",
    b"null",
    b"[]",
    b'"a"',
    b"1",
    b"{",
    b"{}",
    b"nan",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b"\xff\xfe{\x00}\x00",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}",
    b'{"prompt": 1' + b"0" * 9000 + b"}",
    b'{"prompt": [' + b"1," * 300_000 + b'"a"]}',
    b'{"prompt": ["a"' + b',"a"' * 100_000 + b"]}",
    b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}",
    b'{"messages": [{' + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}]}",
    b'{"messages": [' + b"1," * 300_000 + b"1]}",
    b'{"messages": [{"role": "user", "content": [' + b"1," * 300_000 + b"1]}]}",
    b'{"stop": [' + b"1," * 300_000 + b'1], "prompt": "a"}',
    b'{"stop_token_ids": [' + b'"a",' * 300_000 + b'1], "prompt": "a"}',
    b'{"logit_bias": {' + b",".join(b'"%d": "x"' % i for i in range(100_000)) + b'}, "prompt": "a"}',
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": '
    + b'{"a":' * 210
    + b"1"
    + b"}" * 213,
    b'{"' + b"k" * 2_000_000 + b'": 1}',
    b'{"prompt": "a", "model": "' + b"m" * 2_000_000 + b'"}',
)


def _mutants(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Valid bodies with fields of odd values, cut short, or with bytes turned."""
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(PATHS)
        body = dict(VALID[path])
        for _ in range(rng.randint(1, 3)):
            body[rng.choice(FIELDS)] = rng.choice(VALUES)
        raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        kind = rng.random()
        if kind < 0.15:
            raw = raw[: rng.randrange(len(raw))]
        elif kind < 0.3:
            damaged = bytearray(raw)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            raw = bytes(damaged)
        elif kind < 0.35:
            raw = rng.randbytes(rng.randrange(200))
        yield path, raw


def _check(http: Any, path: str, raw: bytes, may_be_fine: bool) -> None:
    begin = time.monotonic()
    reply = http.post(path, content=raw, headers={"Content-Type": "application/json"})
    seconds = time.monotonic() - begin
    shown = (path, raw[:300], reply.status_code, reply.text[:300])
    assert 400 <= reply.status_code < 500 or (may_be_fine and reply.status_code == 200), shown
    assert seconds < 5, shown
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], shown
        assert len(reply.content) < 2000 and "\n" not in error["message"], shown


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_request(shared: Any, path: str) -> None:
    before = _resident_bytes()
    with shared.http() as http:
        for raw in WHOLE:
            _check(http, path, raw, False)
        assert http.get("/health").status_code == 200
    assert _resident_bytes() - before < 400 << 20


def _fuzz(served: Any, seed: int, count: int) -> None:
    before = _resident_bytes()
    with served.http() as http:
        for path, raw in _mutants(seed, count):
            _check(http, path, raw, True)
        assert http.get("/health").status_code == 200
    served.eventually(lambda: not served.engine.running)
    assert _resident_bytes() - before < 200 << 20


def test_500_mutants(shared: Any) -> None:
    _fuzz(shared, int(os.environ.get("FUZZ_SEED", "0")), 500)


@pytest.mark.slow
def test_10000_mutants(shared: Any) -> None:
    _fuzz(shared, 1, 10_000)
