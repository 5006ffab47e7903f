"""`moeforge serve MODEL`: an OpenAI-compatible server and a page to chat with the model."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moeforge.cli.output import Json, emit, stderr_console
from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.config.serving import EngineConfig
    from moeforge.serve.openai.settings import ServerSettings

EXTRA = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, GGUF file, hub id or preset.")],
    host: Annotated[str, typer.Option(help="The address to serve on; others than loopback need an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one, which is printed.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one a line, each a tenant; or one in MOEFORGE_API_KEY."),
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Serve on any address without a key.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name under which clients reach the server; may be repeated."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in the API; default: MODEL as given.")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs that share every layer; any number; default: 1.")
    ] = None,
    gpu_split: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="A weight, or the memory, of each GPU; default: equal.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A layout that `moeforge plan serve --out` wrote.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Compute in auto (as stored; bf16 for GGUF), bf16, fp32 or fp64.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    load_format: Annotated[
        Literal["auto", "dummy"], typer.Option(help="dummy: random weights, only the configuration is read.")
    ] = "auto",
    skip_tokenizer_init: Annotated[bool, typer.Option("--skip-tokenizer-init", help="Serve token ids only.")] = False,
    max_model_len: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens of a sequence; default: the model's positions.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(metavar="N", help="Most sequences that run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of one step.")] = 2048,
    max_waiting: Annotated[int, typer.Option(metavar="N", help="Most requests that wait; more get 429.")] = 1024,
    block_size: Annotated[int, typer.Option(metavar="N", help="Tokens of a page of the KV cache.")] = 16,
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        typer.Option("--kv-dtype", "--kv-cache-dtype", help="How keys and values are held; auto: as computed."),
    ] = "auto",
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For the KV cache of each GPU: bytes, or 4GiB, 500MiB, ...")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="X", help="Share of a GPU's memory that the server may take.")
    ] = 0.95,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse what prompts have in common."),
    ] = True,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="On a CPU: the same bits alone or batched, cached or not; slower.")
    ] = False,
    shutdown_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may go on after SIGTERM.")
    ] = 30.0,
    json: Json = False,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/completions, /metrics, and a page to chat at /.

    SIGTERM or Ctrl-C stops it when what runs has been answered, and exits with 0.
    """
    require_extra()
    if not 0 <= shutdown_timeout < 1e6:
        raise UserError(f"--shutdown-timeout {shutdown_timeout:g}: must be at least 0 seconds")
    from moeforge.config.gpus import parse_gpu_split
    from moeforge.config.serving import EngineConfig

    parts = None if gpu_split is None else parse_gpu_split(gpu_split, tp or gpu_split.count(",") + 1)
    config = EngineConfig(
        dtype=dtype,
        device=device,
        load_format=load_format,
        skip_tokenizer_init=skip_tokenizer_init,
        tensor_parallel_size=tp if tp is not None else 1 if parts is None else len(parts),
        gpu_split=parts,
        plan=plan,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_waiting=max_waiting,
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=None if kv_cache_memory is None else parse_bytes(kv_cache_memory),
        gpu_memory_utilization=gpu_memory_utilization,
        enable_prefix_caching=enable_prefix_caching,
        deterministic=deterministic,
    )
    settings = _settings(
        served_model_name or model.rstrip("/") or model, host, api_key_file, allow_unauthenticated, allowed_host or []
    )
    _serve(model, config, settings, host, port, shutdown_timeout, json)


def missing_packages() -> list[str]:
    """What the server needs and is not installed."""
    return [name for name in EXTRA if importlib.util.find_spec(name) is None]


def require_extra() -> None:
    """Raises UserError with the command that installs what the server needs where it is missing."""
    if missing := missing_packages():
        raise UserError(f"serve: {', '.join(missing)} not installed; pip install 'moeforge[serve]'")


def parse_bytes(text: str) -> int:
    """Bytes of "1000", "4GiB", "500M", "4GB": units are powers of 1024, but of 1000 where only a B follows."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?(?:([KMGT])(iB?|B)?|B)?", text.strip(), re.IGNORECASE)
    power = "_KMGT".index((match[2] or "_").upper()) if match else 0
    count = int(float(match[1]) * (1000 if (match[3] or "").upper() == "B" else 1024) ** power) if match else 0
    if count < 1:
        raise UserError(f"--kv-cache-memory {text}: must be a number of bytes, like 4GiB, 500MiB or 1000000000")
    return count


def _settings(name: str, host: str, key_file: Path | None, unauthenticated: bool, allowed: list[str]) -> ServerSettings:
    from moeforge.serve.openai.settings import (
        API_KEY_VARIABLE,
        LOOPBACK_NAMES,
        ServerSettings,
        is_loopback,
        others_may_read,
        read_keys,
    )

    keys, local = read_keys(key_file), is_loopback(host)
    if not keys and not local and not unauthenticated:
        raise UserError(
            f"--host {host}: anyone who reaches it could use the model; give keys (--api-key-file, or one in "
            f"{API_KEY_VARIABLE}), or --allow-unauthenticated if that is meant"
        )
    if key_file is not None and others_may_read(key_file):
        stderr_console().print(f"warning: other users may read {key_file}; chmod 600 it", highlight=False)
    names = tuple(name.lower() for name in (*LOOPBACK_NAMES, host, *allowed)) if local else tuple(allowed) or None
    return ServerSettings(model=name, keys=keys, allowed_hosts=names)


def _serve(
    model: str, config: EngineConfig, settings: ServerSettings, host: str, port: int, timeout: float, json: bool
) -> None:
    import asyncio

    from moeforge.serve.async_engine import AsyncEngine
    from moeforge.serve.engine import Engine
    from moeforge.serve.openai import server

    with server.bind(host, port) as sock:  # before the model is loaded: a port in use is told at once
        begin = time.monotonic()
        started: list[AsyncEngine] = []
        with stderr_console().status(f"loading {model}"):
            engine = Engine(config, model, lambda message: started[0].fail(message) if started else None)
        started.append(AsyncEngine(engine))
        result: dict[str, Any] = {
            "url": server.url_of(sock),
            "model": settings.model,
            "kv_tokens": engine.kv_cache_tokens,
            "max_model_len": engine.max_model_len,
            "ranks": engine.layout.world_size,
            "authentication": bool(settings.keys),
            "load_seconds": round(time.monotonic() - begin, 3),
        }
        human = (
            f"{settings.model} at {result['url']}: a page to chat, the API below /v1, /metrics\n"
            f"KV cache of {engine.kv_cache_tokens:,} tokens, at most {engine.max_model_len:,} a sequence; Ctrl-C stops"
        )
        asyncio.run(server.run(started[0], settings, sock, timeout, lambda: emit(result, json, human)))
