"""What a decode step takes: bytes over bandwidth, FLOPs where they take longer, and the collectives between ranks.

Every layer has two barriers, after attention and after the feed-forward, at which all ranks wait for the slowest. A
step of B sequences reads each weight of attention and head once, of the experts those that B even draws of K are
expected to touch, E (1 - (1 - K/E)^B), and the KV cache of all live tokens. Summing partial results is an all-reduce of
B * D elements after the embedding and at every barrier; the logits of all vocabulary rows are gathered once. Nothing
is hidden behind anything else, and launching costs nothing (CUDA graphs) but what `host_seconds` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from moeforge.config.gpus import shared_link
from moeforge.config.hardware import HardwareProfile, Precision
from moeforge.config.model import ModelConfig
from moeforge.errors import UserError
from moeforge.plan.serving_memory import Storage, attention_bytes, expert_bytes, gate_bytes
from moeforge.plan.serving_shards import ServingShard


@dataclass(frozen=True)
class StepTime:
    """Seconds. `attention`, `ffn`, `head`: until the slowest rank is done; `busy`: each rank's own work in them."""

    attention: float
    ffn: float
    head: float
    all_reduce: float
    gather: float
    host: float
    busy: tuple[float, ...]

    @property
    def compute(self) -> float:
        """All phases of own work, each until its barrier."""
        return self.attention + self.ffn + self.head

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.all_reduce + self.gather + self.host


class _Layer(NamedTuple):
    """What a layer's time depends on: of each rank its KV groups and columns, and the bytes of attention and of the
    feed-forward or one expert."""

    groups: tuple[int, ...]
    columns: tuple[int, ...]
    attention: tuple[int, ...]
    expert: tuple[int, ...]
    routed: bool
    window: int | None


@dataclass(frozen=True)
class Decoder:
    """The model on its ranks, or, as a pipeline stage, `layers` of it with or without its ends."""

    model: ModelConfig
    shards: tuple[ServingShard, ...]
    gpus: tuple[HardwareProfile, ...]
    stored: Storage
    layers: range
    embed: bool = True
    head: bool = True

    def step(self, batch: int, context: int, host_seconds: float = 0.0) -> StepTime:
        """One token for each of `batch` sequences that hold `context` tokens each.

        Raises UserError where a GPU's profile lacks the rate of the precision that the model computes in.
        """
        attention = ffn = head = 0.0
        busy = [0.0] * len(self.gpus)
        for layer, times in self._layers.items():
            live = min(context, layer.window or context)
            first = [self._attention(rank, layer, batch, live) for rank in range(len(busy))]
            second = [self._ffn(rank, layer, batch) for rank in range(len(busy))]
            attention, ffn = attention + times * max(first), ffn + times * max(second)
            busy = [own + times * (a + f) for own, a, f in zip(busy, first, second, strict=True)]
        if self.head:
            third = [self._head(rank, batch) for rank in range(len(busy))]
            head, busy = max(third), [own + h for own, h in zip(busy, third, strict=True)]
        return StepTime(attention, ffn, head, self._all_reduces(batch), self._gather(batch), host_seconds, tuple(busy))

    @cached_property
    def _layers(self) -> Counter[_Layer]:
        """Layers, and how many are alike."""
        m, stored = self.model, self.stored
        return Counter(
            _Layer(
                tuple(shard.kv_groups[layer] for shard in self.shards),
                tuple(shard.columns[layer] for shard in self.shards),
                tuple(attention_bytes(m, layer, shard.group_ranges[layer], stored) for shard in self.shards),
                tuple(expert_bytes(m, layer, shard.column_ranges[layer], stored) for shard in self.shards),
                m.is_moe_layer(layer),
                m.window(layer),
            )
            for layer in self.layers
        )

    def _seconds(self, rank: int, read: float, flops: float) -> float:
        gpu = self.gpus[rank]
        return max(read / (gpu.memory_gbytes_per_second * 1e9), flops / (self._tflops(gpu) * 1e12))

    def _tflops(self, gpu: HardwareProfile) -> float:
        precision: Precision = "bf16" if self.stored.other == 2 else "fp32" if self.stored.other == 4 else "fp64"
        if precision not in gpu.matmul:
            raise UserError(f"hardware profile {gpu.name}: matmul.{precision}: missing, the model computes in it")
        return gpu.matmul[precision][-1].tflops

    def _attention(self, rank: int, layer: _Layer, batch: int, live: int) -> float:
        m, groups = self.model, layer.groups[rank]
        read = layer.attention[rank] + batch * live * groups * 2 * m.head_dim * self.stored.kv
        heads = groups * m.heads_per_group
        projections = 2 * batch * 2 * m.hidden_size * m.head_dim * (heads + groups)
        return self._seconds(rank, read, projections + 4 * batch * live * heads * m.head_dim)

    def _ffn(self, rank: int, layer: _Layer, batch: int) -> float:
        m, one = self.model, layer.expert[rank]
        flops = 2 * batch * 3 * m.hidden_size * layer.columns[rank]
        if m.moe is None or not layer.routed:
            return self._seconds(rank, one, flops)
        read = experts_touched(m, batch) * one + gate_bytes(m, self.stored)
        return self._seconds(rank, read, m.moe.top_k * flops + 2 * batch * m.hidden_size * m.moe.num_experts)

    def _head(self, rank: int, batch: int) -> float:
        elements = self.shards[rank].vocab_rows * self.model.hidden_size
        return self._seconds(rank, elements * self.stored.other, 2 * batch * elements)

    def _all_reduces(self, batch: int) -> float:
        n, link = len(self.gpus), shared_link(self.gpus)
        if n == 1:
            return 0.0
        sent = 2 * (n - 1) / n * batch * self.model.hidden_size * self.stored.other
        each = link.latency_us / 1e6 + sent / (link.gbytes_per_second * 1e9)
        return (2 * len(self.layers) + self.embed) * each

    def _gather(self, batch: int) -> float:
        n, link = len(self.gpus), shared_link(self.gpus)
        if n == 1 or not self.head:
            return 0.0
        sent = (n - 1) / n * batch * self.model.vocab_size * self.stored.other
        return link.latency_us / 1e6 + sent / (link.gbytes_per_second * 1e9)


def experts_touched(model: ModelConfig, batch: int) -> float:
    """Experts of a layer that a step of `batch` tokens is expected to read, all equally likely."""
    assert model.moe is not None
    count = model.moe.num_experts
    return count * (1 - (1 - model.moe.top_k / count) ** batch)


def attention_efficiency(shards: Sequence[ServingShard]) -> float:
    """Mean over maximum of the ranks' KV groups, over all layers: the share of attention's time that is not waiting."""
    layers = list(zip(*(shard.kv_groups for shard in shards), strict=True))
    return sum(map(sum, layers)) / (len(shards) * sum(map(max, layers)))
