"""The plan of a server: which rank holds what, the KV cache that leaves room for, and how long steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moeforge.config.hardware import HardwareProfile
from moeforge.config.model import ModelConfig
from moeforge.config.quantization import QuantizationConfig
from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, serving_layout
from moeforge.plan.serving_memory import (
    Dtype,
    Storage,
    kv_token_bytes,
    replicated_bytes,
    storage,
    usable_bytes,
    weight_bytes,
)
from moeforge.plan.serving_shards import ServingShard, shards_of
from moeforge.plan.serving_time import Decoder, StepTime, attention_efficiency

ONE_SCALE_EACH = QuantizationConfig("tensor")
"""FP8 weights as Skywork-MoE's released ones: what plans take a model for that is not FP8 yet."""


@dataclass(frozen=True)
class ServingRequest:
    """What is to be served on which GPUs, one a rank. The model's `quantization` says which weights are FP8; the others
    are held, and all is computed, in `dtype`. Of `engine` the sizes count; `context`: live tokens of each sequence for
    which step times are given (None: 256, or the longest allowed)."""

    model: ModelConfig
    gpus: tuple[HardwareProfile, ...]
    engine: EngineConfig
    dtype: Dtype = "bf16"
    context: int | None = None

    @property
    def weights(self) -> str:
        """How most weights are held."""
        return self.dtype if self.model.quantization is None else "fp8"

    @property
    def stored(self) -> Storage:
        """Bytes of elements."""
        return storage(self.dtype, self.engine.kv_cache_dtype)

    @property
    def max_model_len(self) -> int:
        """Most positions of a sequence."""
        return self.engine.max_model_len or self.model.max_positions

    @property
    def live_tokens(self) -> int:
        """Tokens that a sequence holds in the steps whose time is given."""
        return self.context or min(256, self.max_model_len)

    @property
    def usable(self) -> tuple[int, ...]:
        """Bytes of each GPU for weights and pages."""
        return tuple(usable_bytes(gpu, self.engine.gpu_memory_utilization) for gpu in self.gpus)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. `num_blocks`: pages for which it has room, None where it holds no keys and values at all."""

    usable_bytes: int
    weight_bytes: int
    kv_token_bytes: int
    num_blocks: int | None

    @property
    def free_bytes(self) -> int:
        """Left for pages; below 0 where the weights do not fit."""
        return self.usable_bytes - self.weight_bytes


@dataclass(frozen=True)
class ServingPlan:
    """A layout and what it costs. Pages hold `block_size` positions; there are as many as the tightest rank has room
    for."""

    request: ServingRequest
    layout: Layout
    shards: tuple[ServingShard, ...]
    memory: tuple[RankMemory, ...]

    @property
    def num_blocks(self) -> int:
        """Pages of the KV cache."""
        return most_blocks(self.memory)

    @property
    def kv_tokens(self) -> int:
        """Positions of the KV cache, over all sequences."""
        return self.num_blocks * self.request.engine.block_size

    @property
    def fits(self) -> bool:
        """Whether the weights fit and one sequence of the greatest length does."""
        return self.num_blocks >= -(-self.request.max_model_len // self.request.engine.block_size)

    @property
    def most_sequences(self) -> int:
        """How many sequences of `live_tokens` run at once."""
        pages = -(-self.request.live_tokens // self.request.engine.block_size)
        return min(self.request.engine.max_num_seqs, self.num_blocks // pages)

    @property
    def attention_efficiency(self) -> float:
        """See `serving_time.attention_efficiency`."""
        return attention_efficiency(self.shards)

    def step(self, batch: int) -> StepTime:
        """A decode step of `batch` sequences."""
        return self._decoder.step(batch, self.request.live_tokens)

    @property
    def batches(self) -> tuple[int, ...]:
        """The powers of two below `most_sequences`, and that; empty where not one sequence has room."""
        powers = [1 << power for power in range(self.most_sequences.bit_length())]
        return tuple(sorted({*powers, self.most_sequences} - {0}))

    @cached_property
    def _decoder(self) -> Decoder:
        r = self.request
        return Decoder(r.model, self.shards, r.gpus, r.stored, range(r.model.num_layers))


def plan_serving(request: ServingRequest) -> ServingPlan:
    """Shares after `engine.gpu_split`, or after what each GPU has to give, so that all run out of room together.

    Raises UserError for lengths beyond the model's positions and for more ranks than there is to share.
    """
    model, length, context = request.model, request.max_model_len, request.live_tokens
    if length > model.max_positions:
        raise UserError(f"max_model_len = {length}: must be at most {model.max_positions}, the model's positions")
    if not 1 <= context <= length:
        raise UserError(f"context = {context}: must be 1 to {length}, the longest sequence (max_model_len)")
    layout = serving_layout(model, len(request.gpus), shares(request))
    shards = shards_of(layout)
    return ServingPlan(request, layout, shards, rank_memory(request, shards))


def shares(request: ServingRequest) -> Sequence[float] | None:
    """Weights of the ranks, None where all are alike."""
    if request.engine.gpu_split is not None:
        return request.engine.gpu_split
    fixed = replicated_bytes(request.model, request.stored)
    given = [float(max(0, usable - fixed)) for usable in request.usable]
    return given if len(set(given)) > 1 else None


def rank_memory(request: ServingRequest, shards: Sequence[ServingShard]) -> tuple[RankMemory, ...]:
    """What these shards take, and leave, on the GPUs of a request."""
    found = []
    for usable, shard in zip(request.usable, shards, strict=True):
        weights = weight_bytes(request.model, shard, request.stored)
        each = kv_token_bytes(request.model, shard, request.stored)
        free = max(0, usable - weights)
        # A rank that holds nothing of the cache limits nothing, unless its weights are too much already.
        none = None if usable >= weights else 0
        blocks = free // (each * request.engine.block_size) if each else none
        found.append(RankMemory(usable, weights, each, blocks))
    return tuple(found)


def most_blocks(memory: Sequence[RankMemory]) -> int:
    """Pages for which every rank has room."""
    return min((rank.num_blocks for rank in memory if rank.num_blocks is not None), default=0)


def pooled_blocks(memory: Sequence[RankMemory], block_size: int) -> int:
    """The bound that no division passes: pages if all ranks' memory were one."""
    free = sum(rank.free_bytes for rank in memory)
    return max(0, free) // (block_size * sum(rank.kv_token_bytes for rank in memory))
