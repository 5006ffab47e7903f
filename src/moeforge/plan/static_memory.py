"""What a rank keeps through the step for the weights of its units, and what updating them takes. Sizes in bytes.

Exact where sizes divide; where they do not, those of a rank that has most of everything, of every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from moeforge.plan.ledger import Ledger
from moeforge.plan.memory import bytes_per_parameter
from moeforge.plan.pieces import wide_width, width
from moeforge.plan.workload import Workload

Replicas = Literal["dp", "dp_tp", "expert_dp"]
# Elements of one collective of the update: see `parallel.zero`.
_BUCKET = 32 * 2**20


class Part(NamedTuple):
    """A parameter on one rank: its elements there, and the ranks that hold the same ones."""

    numel: int
    replicas: Replicas


@lru_cache(maxsize=4096)
def unit_parts(work: Workload, unit: str) -> tuple[Part, ...]:
    """The parameters of a unit on one rank, in the order of `parallel.parameters`; no tied matrix for the head."""
    c, kind = work.model, unit.rpartition(".")[2]
    d, h, p, g = c.hidden_size, c.head_dim, c.heads_per_group, work.kv_groups
    matrix = Part(work.vocab_rows * d, "dp")
    if kind == "embed":
        return (matrix,)
    parts = [Part(d, "dp_tp")]
    if kind == "head":
        return tuple(parts) if c.tie_embeddings else (*parts, matrix)
    if kind == "attention":
        rows = g * (p + 2) * h
        parts.append(Part(rows * d, "dp"))
        if c.qkv_bias:
            parts.append(Part(rows, "dp"))
        if c.qk_norm == "head":
            parts += [Part(h, "dp_tp")] * 2
        elif c.qk_norm == "full":
            parts += [Part(g * p * h, "dp"), Part(g * h, "dp")]
        parts.append(Part(d * g * p * h, "dp"))
        if c.output_bias:
            parts.append(Part(d, "dp_tp"))
    elif c.moe is not None and c.is_moe_layer(int(unit.split(".")[1])):
        parts.append(Part(c.moe.num_experts * d, "dp_tp"))
        if c.moe.router_bias:
            parts.append(Part(c.moe.num_experts, "dp_tp"))
        if c.moe.gate_norm_learned:
            parts.append(Part(1, "dp_tp"))
        column = work.experts * d * work.expert_columns
        parts += [Part(2 * column, "expert_dp"), Part(column, "expert_dp")]
    else:
        parts += [Part(2 * work.ffn_columns * d, "dp"), Part(d * work.ffn_columns, "dp")]
    return tuple(parts)


def copies(work: Workload, replicas: Replicas) -> int:
    """Ranks of a group."""
    return {"dp": work.dp, "dp_tp": work.dp * work.tp, "expert_dp": work.expert_dp}[replicas]


@lru_cache(maxsize=4096)
def unit_static_bytes(work: Workload, unit: str) -> int:
    """Weights, gradients and optimiser state of a unit on one rank; with ZeRO-1 the last of its share alone."""
    each, total = bytes_per_parameter(work.precision, work.optimizer), 0
    for numel, replicas in unit_parts(work, unit):
        owned = -(-numel // copies(work, replicas)) if work.zero else numel
        total += numel * (each.weights + each.gradients) + owned * each.optimizer
    return total


def static_bytes(work: Workload, units: Iterable[str]) -> int:
    """The same of all units of one rank. A tied matrix is counted where the embedding is, and again where the head is
    without it."""
    return sum(unit_static_bytes(work, unit) for unit in _with_tied_copy(work, units))


def _with_tied_copy(work: Workload, units: Iterable[str]) -> Iterator[str]:
    names = list(units)
    yield from names
    if work.model.tie_embeddings and "head" in names and "embed" not in names:
        yield "embed"


def update_transient_bytes(work: Workload, units: Iterable[str]) -> int:
    """Buffers of one optimiser step over a rank's units (`train.optimizer`, `parallel.zero`), beyond `static_bytes`.

    Gradients are packed for the reduction bucket by bucket; what has been summed stays until the step ends; updated
    weights are gathered bucket by bucket. By then the activations are gone.
    """
    gradient, w, wide = bytes_per_parameter(work.precision, work.optimizer).gradients, width(work), wide_width(work)
    parts = [part for unit in _with_tied_copy(work, units) for part in unit_parts(work, unit)]
    ledger = Ledger()
    groups = [(copies(work, group), [part.numel for part in parts if part.replicas == group]) for group in _GROUPS]
    buckets = [(size, bucket) for size, numels in groups if size > 1 for bucket in _buckets(numels)]
    for size, bucket in buckets:
        own = _own(bucket, size)
        # One parameter that divides, and is in the right type already, is not packed.
        packed = 0 if len(bucket) == 1 and bucket[0] == size * own and gradient == wide else size * own * wide
        if work.zero:
            ledger.take(packed, own * wide)
            ledger.free(packed)
        else:
            ledger.take(sum(bucket) * wide)
    if gradient < wide:  # pure 16-bit training: the optimiser takes the sums in that
        ledger.take(sum((_own(bucket, size) if work.zero else sum(bucket)) * w for size, bucket in buckets))
    if work.zero:
        for size, bucket in buckets:
            own = _own(bucket, size)
            ledger.visit(own * w, size * own * w, max(bucket) * w)
    return round(ledger.peak)


_GROUPS: tuple[Replicas, ...] = ("dp", "dp_tp", "expert_dp")


def _own(bucket: Iterable[int], size: int) -> int:
    """Elements of a rank's share of some parameters."""
    return sum(-(-numel // size) for numel in bucket)


def _buckets(numels: Iterable[int]) -> Iterator[list[int]]:
    """As `Zero._buckets`."""
    bucket: list[int] = []
    for numel in numels:
        if bucket and sum(bucket) + numel > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(numel)
    if bucket:
        yield bucket
