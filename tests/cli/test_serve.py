"""`moeforge serve`: its options, what it refuses before loading anything, and its life as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moeforge.cli import serve as verb
from moeforge.cli.app import main
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.serve.openai.settings import ServerSettings

Model = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEFORGE_API_KEY", raising=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EngineConfig, ServerSettings]]:
    """`asked(options...)`: what the engine and the server would be started with."""

    def run(*options: str) -> tuple[EngineConfig, ServerSettings]:
        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(verb, "_serve", lambda *arguments: calls.append(arguments))
        assert main(["serve", "some/model", *options]) == 0
        return calls[0][1], calls[0][2]

    return run


def test_defaults_are_the_engines_and_safe(asked: Any) -> None:
    engine, settings = asked()
    assert engine == EngineConfig()
    assert settings == ServerSettings("some/model", allowed_hosts=settings.allowed_hosts)
    assert set(settings.allowed_hosts) == {"localhost", "127.0.0.1", "[::1]"}


def test_every_option_reaches_the_engine(asked: Any, tmp_path: Path) -> None:
    engine, settings = asked(
        "--tp", "3", "--gpu-split", "24,24,12", "--plan", str(tmp_path), "--dtype", "fp32", "--device", "cpu",
        "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "100", "--max-num-seqs", "5",
        "--max-num-batched-tokens", "64", "--max-waiting", "7", "--block-size", "8", "--kv-dtype", "fp8",
        "--kv-cache-memory", "2GiB", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching", "--deterministic",
        "--served-model-name", "nice",
    )  # fmt: skip
    assert engine == EngineConfig(
        dtype="fp32", device="cpu", load_format="dummy", skip_tokenizer_init=True, tensor_parallel_size=3,
        gpu_split=(24.0, 24.0, 12.0), plan=tmp_path, max_model_len=100, max_num_seqs=5, max_num_batched_tokens=64,
        max_waiting=7, block_size=8, kv_cache_dtype="fp8", kv_cache_memory_bytes=2 << 30, gpu_memory_utilization=0.5,
        enable_prefix_caching=False, deterministic=True,
    )  # fmt: skip
    assert settings.model == "nice"
    assert asked("--gpu-split", "1,1,2")[0].tensor_parallel_size == 3


def test_keys_and_hosts(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    keys.chmod(0o600)
    _, settings = asked("--host", "0.0.0.0", "--api-key-file", str(keys))
    assert settings.keys == (b"one", b"two") and settings.allowed_hosts is None
    assert "other users" not in capsys.readouterr().err
    keys.chmod(0o644)
    asked("--api-key-file", str(keys), "--allowed-host", "My.Proxy")
    assert "other users may read" in " ".join(capsys.readouterr().err.split())
    assert asked("--host", "0.0.0.0", "--allow-unauthenticated", "--allowed-host", "a.b")[1].allowed_hosts == ("a.b",)
    assert "my.proxy" in asked("--allowed-host", "My.Proxy")[1].allowed_hosts
    monkeypatch.setenv("MOEFORGE_API_KEY", "three")
    assert asked("--host", "::")[1].keys == (b"three",)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("4GiB", 4 << 30), ("4G", 4 << 30), ("4GB", 4 * 10**9), ("1.5MiB", 3 << 19), ("512k", 512 << 10)],
)
def test_sizes(text: str, count: int) -> None:
    assert verb.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "4XB", "1e400", "nan", "inf", "4 i", "GiB4"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="--kv-cache-memory"):
        verb.parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "--allow-unauthenticated"),
        (("--host", "::"), "--host ::"),
        (("--host", "not a host"), "no address"),
        (("--port", "70000"), "--port 70000"),
        (("--api-key-file", "/nowhere/keys"), "cannot be read"),
        (("--max-num-seqs", "0"), "max_num_seqs = 0"),
        (("--kv-cache-memory", "much"), "--kv-cache-memory much"),
        (("--tp", "2", "--gpu-split", "1,2,3"), "gpu_split"),
        (("--shutdown-timeout", "-1"), "--shutdown-timeout -1"),
        (("--shutdown-timeout", "nan"), "--shutdown-timeout nan"),
        (("--load-format", "magic"), "magic"),
        (("--max-model-len", "65"), "max_model_len = 65"),
    ],
)
def test_bad_options_are_one_line(model: Model, refused: Any, options: tuple[str, ...], words: str) -> None:
    arguments = ["serve", str(model()), "--device", "cpu", *options]
    assert words in refused([*arguments, *([] if "--port" in options else ["--port", "0"])])


def test_a_port_in_use_is_told_before_loading(refused: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert f"--port {port}: is in use on 127.0.0.1" in refused(["serve", "nowhere/model", "--port", str(port)])


def test_a_missing_extra_is_one_line(model: Model, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert "uvicorn not installed; pip install 'moeforge[serve]'" in refused(["serve", str(model())])


@pytest.fixture
def process(model: Model) -> Iterator[Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]]:
    """`process(options...)`: a server of a small model as a process, and the JSON that it printed."""
    running: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        command = [sys.executable, "-m", "moeforge", "serve", str(model("long")), "--device", "cpu", "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [*command, "--json", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        running.append(server)
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line, server.stderr.read()
        return server, json.loads(line)

    yield start
    for server in running:
        server.kill()
        server.communicate()


def test_a_server_from_start_to_end(process: Any) -> None:
    server, ready = process("--served-model-name", "words", "--max-model-len", "200")
    assert ready["model"] == "words" and ready["kv_tokens"] > 0 and ready["max_model_len"] == 200
    client = openai.OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=30)
    whole = client.completions.create(model="words", prompt="w1 w2 w3", max_tokens=20, temperature=0)
    ignore = {"ignore_eos": True}
    parts = client.completions.create(
        model="words", prompt="w1 w2 w3", max_tokens=20, temperature=0, stream=True, extra_body=ignore
    )
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts)[: len(whole.choices[0].text)]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="words", messages=[{"role": "user", "content": "w1"}])
    with pytest.raises(openai.BadRequestError, match="at most"):
        client.completions.create(model="words", prompt="w1 " * 300)
    running = client.completions.create(model="words", prompt="w1", max_tokens=190, stream=True, extra_body=ignore)
    next(running)
    server.send_signal(signal.SIGTERM)
    assert len(list(running)) > 100  # it is finished first
    assert server.wait(20) == 0
    assert server.stdout.read() == "" and server.stderr.read() == ""


@pytest.mark.slow
def test_ctrl_c_and_a_key(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFORGE_API_KEY", "sesame")
    server, ready = process()
    assert ready["authentication"] is True
    assert httpx.get(f"{ready['url']}/v1/models", trust_env=False).status_code == 401
    reply = httpx.get(f"{ready['url']}/v1/models", headers={"Authorization": "Bearer sesame"}, trust_env=False)
    assert reply.status_code == 200
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0


def _workers(server: subprocess.Popen[str]) -> list[int]:
    """The server's processes for other ranks."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow  # as a killed rank in tests/serve/openai, with another client
def test_a_killed_worker_ends_every_stream_and_the_server(process: Any) -> None:
    server, ready = process("--tp", "2")
    assert ready["ranks"] == 2
    client = openai.OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0, timeout=60)
    stream = client.completions.create(
        model=ready["model"], prompt="w1", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    os.kill(_workers(server)[-1], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)
    assert server.wait(20) == 1
    error = server.stderr.read()
    assert error.startswith("moeforge: error: the engine failed: ") and error.count("\n") == 1
