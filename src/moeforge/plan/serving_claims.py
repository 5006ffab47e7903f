"""Where 2,200 output tokens a second come out of Skywork-MoE on 8 RTX 4090, under stated all-reduces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from moeforge.config.gpus import load_gpus
from moeforge.config.hardware import HardwareProfile, Link
from moeforge.config.presets import model_preset
from moeforge.config.serving import EngineConfig, KVDtype
from moeforge.layout import serving_layout
from moeforge.plan.serving import ONE_SCALE_EACH, ServingRequest, plan_serving
from moeforge.plan.serving_memory import kv_token_bytes, weight_bytes
from moeforge.plan.serving_shards import shards_of
from moeforge.plan.serving_time import Decoder

CLAIMED, CONTEXT, BLOCK, HOST_SECONDS = 2200, 256, 16, 0.010


class Bus(NamedTuple):
    """What an all-reduce between the cards sees."""

    name: str
    gbytes_per_second: float
    latency_us: float


BUSES = (
    Bus("peer-to-peer kernels: 18 GB/s, 15 us", 18, 15),
    Bus("NCCL through host memory: 12 GB/s, 42 us", 12, 42),
    Bus("two sockets: 6 GB/s, 60 us", 6, 60),
)


class Server(NamedTuple):
    """An arrangement: KV tokens that it has room for, and output tokens/s of (batch, live tokens a sequence)."""

    kv_tokens: int
    rate: Callable[[int, int], float]

    def most(self, context: int) -> int:
        """Sequences that there is room for."""
        return self.kv_tokens // BLOCK // -(-context // BLOCK)


def rotated(bus: Bus, host_seconds: float = 0.0, kv: KVDtype = "auto") -> Server:
    """Our plan: every layer on all 8 cards."""
    request = _request(_cards(bus, 8), kv)
    plan = plan_serving(request)
    decoder = Decoder(request.model, plan.shards, request.gpus, request.stored, range(request.model.num_layers))
    return Server(plan.kv_tokens, lambda batch, context: batch / decoder.step(batch, context, host_seconds).total)


def pipelined(bus: Bus, host_seconds: float = 0.0, kv: KVDtype = "auto") -> Server:
    """TP 4 x PP 2: 26 layers on each half of the cards, 9 heads a card. Two micro-batches of half the sequences take
    turns: while one is in the first stage the other is in the second, so a token takes two turns of the slower stage.
    Each half of the layers costs half the host time; sending hidden states on is not hidden."""
    request = _request(_cards(bus, 4), kv)
    half = dataclasses.replace(request.model, num_layers=request.model.num_layers // 2)
    shards = shards_of(serving_layout(half, 4))
    stored, hidden = request.stored, half.hidden_size * request.stored.other
    # Embedding and head each lie on one of the stages.
    weights = max(weight_bytes(half, s, stored) - s.vocab_rows * hidden for s in shards)
    block = BLOCK * max(kv_token_bytes(half, s, stored) for s in shards)
    ends = ({"embed": True, "head": False}, {"embed": False, "head": True})
    stages = [Decoder(half, shards, request.gpus, stored, range(half.num_layers), **end) for end in ends]
    latency, bandwidth = bus.latency_us / 1e6, bus.gbytes_per_second * 1e9

    def rate(batch: int, context: int) -> float:
        micro = -(-batch // 2)
        first, second = (stage.step(micro, context, host_seconds / 2).total + latency for stage in stages)
        turn = max(first + micro * hidden / bandwidth, second)
        return batch / (2 * turn)

    return Server((request.usable[0] - weights) // block * BLOCK, rate)


def smallest_batch(server: Server, context: int = CONTEXT) -> int | None:
    """Sequences from which on the claimed rate is reached; None where that needs more than there is room for."""
    return next((n for n in range(1, server.most(context) + 1) if server.rate(n, context) >= CLAIMED), None)


def longest_context(server: Server) -> int | None:
    """Live tokens a sequence, in whole pages, up to which a full cache reaches the claimed rate."""
    reaching = [c for c in range(BLOCK, 4096, BLOCK) if (n := server.most(c)) and server.rate(n, c) >= CLAIMED]
    return max(reaching, default=None)


def figures() -> tuple[tuple[str, str], ...]:
    """(What, value) pairs for a reader."""
    rows = []
    for bus in BUSES:
        for host in (0.0, HOST_SECONDS):
            title = f"{bus.name}, host {host * 1e3:.0f} ms"
            rows.append((f"{title}: TP 8, rotated", _shown(rotated(bus, host))))
            rows.append((f"{title}: TP 4 x PP 2", _shown(pipelined(bus, host))))
    for bus in BUSES:
        server = rotated(bus, HOST_SECONDS, "fp8")
        rows.append((f"{bus.name}, host {HOST_SECONDS * 1e3:.0f} ms: TP 8, rotated, fp8 KV cache", _shown(server)))
    for what, made in (("TP 8, rotated", rotated), ("TP 4 x PP 2", pipelined)):
        tokens, fp8 = made(BUSES[0]).kv_tokens, made(BUSES[0], kv="fp8").kv_tokens
        rows.append((f"KV tokens that fit, {what}", f"{tokens:,}, {fp8:,} in fp8"))
    return tuple(rows)


def _shown(server: Server) -> str:
    batch, most = smallest_batch(server), server.most(CONTEXT)
    if batch is None:
        full = server.rate(most, CONTEXT)
        shown = f"never within memory at {CONTEXT} live tokens ({full:,.0f} tokens/s with all {most} sequences)"
    else:
        shown = f"B = {batch} at {CONTEXT} live tokens ({batch * CONTEXT:,} in all)"
    longest = longest_context(server)
    if longest is None:
        return f"{shown}; at no context"
    return f"{shown}; a full cache up to {longest} live tokens (B = {server.most(longest)})"


def _cards(bus: Bus, count: int) -> tuple[HardwareProfile, ...]:
    link = Link(gbytes_per_second=bus.gbytes_per_second, latency_us=bus.latency_us)
    return tuple(card.model_copy(update={"intra_node": link}) for card in load_gpus(f"{count}x4090"))


def _request(gpus: tuple[HardwareProfile, ...], kv: KVDtype) -> ServingRequest:
    engine = EngineConfig(tensor_parallel_size=len(gpus), kv_cache_dtype=kv, block_size=BLOCK)
    model = dataclasses.replace(model_preset("skywork-moe"), quantization=ONE_SCALE_EACH)
    return ServingRequest(model, gpus, engine)
