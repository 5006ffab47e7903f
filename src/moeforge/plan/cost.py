"""What every unit computes, moves through memory and sends: FLOPs, bytes and messages of one rank.

A multiply-add counts as 2 FLOPs. Legend: T tokens of a micro-batch, t a rank's own, D hidden, F columns, E experts,
K top-k, H heads, G KV groups, h head dimension, S positions, R expert rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moeforge.plan.memory import bytes_per_parameter, unit_kind
from moeforge.plan.workload import Workload

GroupName = Literal["tp", "block", "dp", "dp_tp", "expert_dp"]
Operation = Literal["all_gather", "reduce_scatter", "all_to_all"]

ELEMENT_BYTES = {"bf16": 2, "bf16_pure": 2, "fp32": 4, "fp64": 8}


class Matmul(NamedTuple):
    """`times` matmuls of `flops` each."""

    flops: float
    times: float = 1


class Message(NamedTuple):
    """A collective in which each rank of `group` sends `bytes` to the others. `overlapped`: travels in chunks behind
    the experts' computation."""

    group: GroupName
    operation: Operation
    bytes: float
    overlapped: bool = False


@dataclass(frozen=True)
class Pass:
    """Work of one pass: matmuls, bytes read and written by all else, messages."""

    matmuls: tuple[Matmul, ...] = ()
    memory_bytes: float = 0.0
    messages: tuple[Message, ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of the matmuls."""
        return sum(flops * times for flops, times in self.matmuls)

    def sent(self, group: GroupName | None = None) -> float:
        """Bytes that a rank sends, over `group` or over all."""
        return sum(m.bytes for m in self.messages if group in (None, m.group))

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.matmuls + other.matmuls, self.memory_bytes + other.memory_bytes, self.messages + other.messages
        )


@dataclass(frozen=True)
class UnitCost:
    """Passes of one micro-batch. `backward_input` and `backward_weight` are the two halves done apart, `backward` both
    at once, which is less where a kernel cannot do one alone; `update` happens once a step."""

    forward: Pass
    backward: Pass
    backward_input: Pass
    backward_weight: Pass
    update: Pass


def unit_cost(work: Workload, unit: str) -> UnitCost:
    """The work of one unit ("embed", "layers.3.attention", ...) on the rank that has most of it."""
    kind = unit_kind(work.model, unit)
    made = {"embed": _embed, "attention": _attention, "dense ffn": _dense, "experts": _experts, "head": _head}[kind]
    forward, backward_input, backward_weight, together = made(work)
    return UnitCost(forward, together, backward_input, backward_weight, _update(work, unit, kind))


_Passes = tuple[Pass, Pass, Pass, Pass]


def _enter_leave(work: Workload) -> tuple[Message, ...]:
    """Into and out of a tensor-parallel region; the backward mirrors it."""
    if work.tp == 1:
        return ()
    sent = work.own_tokens * work.model.hidden_size * _size(work) * (work.tp - 1)
    return Message("tp", "all_gather", sent), Message("tp", "reduce_scatter", sent)


def _split(forward: Pass, matmuls: tuple[Matmul, ...], extra: tuple[Matmul, ...] = ()) -> _Passes:
    """Backward of linear maps: each once for its input, once for its weight; `extra` (attention scores) for the input
    alone. Elementwise passes read and write about twice what the forward did."""
    for_input = Pass(matmuls + extra, 2 * forward.memory_bytes, forward.messages)
    for_weight = Pass(matmuls, 0.5 * forward.memory_bytes)
    return forward, for_input, for_weight, Pass(2 * matmuls + extra, 2 * forward.memory_bytes, forward.messages)


def _embed(work: Workload) -> _Passes:
    moved = 2 * work.own_tokens * work.model.hidden_size * _size(work)
    sent = _enter_leave(work)[1:]
    # Its gradient is scattered into a table of all rows, which is then added to the sum.
    table = work.vocab_rows * work.model.hidden_size * (_size(work) + 8)
    forward, backward = Pass((), moved, sent), Pass((), moved + table, tuple(_mirrored(m) for m in sent))
    return forward, Pass(), backward, backward


def _attention(work: Workload) -> _Passes:
    model, size = work.model, _size(work)
    t, d, h = work.tokens, model.hidden_size, model.head_dim
    heads, groups = work.kv_groups * model.heads_per_group, work.kv_groups
    qkv, out = Matmul(2.0 * t * d * (heads + 2 * groups) * h), Matmul(2.0 * t * heads * h * d)
    window = min(model.sliding_window or work.sequence_length, work.sequence_length)
    pairs = window * (work.sequence_length - (window - 1) / 2)  # causal: each position and those before it
    scores = Matmul(2.0 * pairs * h, 2.0 * heads * work.micro_batch_sequences)
    rows = 7 * work.own_tokens * d + t * h * (3 * heads + 3 * groups)
    forward = Pass((qkv, out, scores), rows * size, _enter_leave(work))
    # Flash attention computes the scores again, then four products (Dao, 2023).
    return _split(forward, (qkv, out), (scores._replace(times=2.5 * scores.times),))


def _dense(work: Workload) -> _Passes:
    t, d, columns = work.tokens, work.model.hidden_size, work.ffn_columns
    matmuls = Matmul(2.0 * t * d * 2 * columns), Matmul(2.0 * t * columns * d)
    moved = (7 * work.own_tokens * d + 3 * t * columns) * _size(work)
    return _split(Pass(matmuls, moved, _enter_leave(work)), matmuls)


def _experts(work: Workload) -> _Passes:
    moe, d, size = work.model.moe, work.model.hidden_size, _size(work)
    assert moe is not None
    t, rows, columns = work.own_tokens, work.received_rows, work.expert_columns
    router = Matmul(2.0 * t * d * moe.num_experts)
    each = rows / max(1, work.experts)
    grouped = (
        Matmul(2.0 * each * d * 2 * columns, work.experts),
        Matmul(2.0 * each * columns * d, work.experts),
    )
    wide = 8 if work.precision == "fp64" else 4
    # Norm, residual and sorting on own tokens; gathering, SwiGLU and combining on expert rows; gate in float32.
    moved = (9 * t * d + rows * (4 * d + 3 * columns)) * size + 20 * work.tokens * moe.num_experts * wide
    forward = Pass((router, *grouped), moved, _dispatch(work) + _statistics(work))
    together = _split(forward, (router, *grouped))[3]
    # The experts' backward is one function of ours: done apart, both halves compute all of it.
    for_input = Pass((router, *(2 * grouped)), 2 * moved, forward.messages)
    for_weight = Pass((router, *(2 * grouped)), 2 * moved)
    return forward, for_input, for_weight, together


def gathers_tokens(work: Workload) -> bool:
    """Whether `parallel.dispatcher` (auto) gives the block all tokens instead of sending each to its experts."""
    assert work.model.moe is not None
    return work.model.moe.top_k * work.etp >= work.block and work.overlap_chunks == 1


def _dispatch(work: Workload) -> tuple[Message, ...]:
    """Tokens to their experts and back (`parallel.dispatcher`)."""
    if work.block == 1:
        return ()
    assert work.model.moe is not None
    row = work.own_tokens * work.model.hidden_size * _size(work)
    if gathers_tokens(work):
        sent = row * (work.block - 1)
        return Message("block", "all_gather", sent), Message("block", "reduce_scatter", sent)
    there = row * work.model.moe.top_k * work.etp * (work.block - 1) / work.block * work.imbalance
    both = Message("block", "all_to_all", there, work.overlap_chunks > 1)
    return both, both


def _statistics(work: Workload) -> tuple[Message, ...]:
    """Gate decisions that tensor-parallel ranks show one another: probabilities, both logits, experts (float32)."""
    if work.tp == 1:
        return ()
    assert work.model.moe is not None
    width = 3 * work.model.moe.num_experts + work.model.moe.top_k
    return (Message("tp", "all_gather", 4.0 * work.own_tokens * width * (work.tp - 1)),)


def _head(work: Workload) -> _Passes:
    """The cross-entropy makes its gradients while the logits are there (`kernels.cross_entropy`)."""
    t, d, rows = work.tokens, work.model.hidden_size, work.vocab_rows
    logits = Matmul(2.0 * t * d * rows)
    enter, leave = _enter_leave(work) or (None, None)
    moved = 6 * work.own_tokens * d * _size(work) + t * rows * (3 * _size(work) + 8)
    forward = Pass((logits,) * 3, moved, () if enter is None else (enter,))
    gradients = (3 * t * d + rows * d * 3) * _size(work) + 8 * rows * d
    backward = Pass((), gradients, () if leave is None else (leave,))
    # Its backward only scales what the forward has made; done apart, both halves do so.
    return forward, backward, backward, backward


def _update(work: Workload, unit: str, kind: str) -> Pass:
    """Gradient reduction over copies, optimiser on the own share, weights back to all (`parallel.zero`)."""
    each = bytes_per_parameter(work.precision, work.optimizer)
    experts, dense = parameters(work, unit)
    moved, messages = 0.0, list[Message]()
    groups: tuple[tuple[GroupName, int, float], ...] = (
        ("dp", work.dp, dense),
        ("expert_dp", work.expert_dp, experts),
    )
    wide = 8 if work.precision == "fp64" else 4
    for group, copies, params in groups:
        owned = params / copies if work.zero else params
        moved += params * (each.gradients + each.weights) + owned * (2 * each.optimizer + 2 * each.gradients)
        if copies > 1 and params:
            moved += 4 * params * wide  # packing and unpacking
            messages.append(Message(group, "reduce_scatter", params * wide * (copies - 1) / copies))
            back = each.weights if work.zero else wide
            messages.append(Message(group, "all_gather", params * back * (copies - 1) / copies))
    return Pass((), moved, tuple(messages))


def parameters(work: Workload, unit: str) -> tuple[float, float]:
    """Weights of a unit on one rank: those of experts, and all others."""
    model = work.model
    total = model.unit_parameters(unit)
    if unit_kind(model, unit) != "experts":
        return 0.0, total / work.tp
    assert model.moe is not None
    every = 3 * model.hidden_size * model.moe.expert_size * model.moe.num_experts
    own = 3 * model.hidden_size * work.expert_columns * work.experts
    return float(own), float(total - every)


def _mirrored(message: Message) -> Message:
    return message._replace(operation="reduce_scatter" if message.operation == "all_gather" else "all_gather")


def _size(work: Workload) -> int:
    return ELEMENT_BYTES[work.precision]


def model_flops_per_token(work: Workload, attention: Literal["none", "causal", "full"] = "causal") -> float:
    """FLOPs of training on one token, recomputation not counted: 6 for every weight that the token meets (of the
    embedding table none, of the head all), and 6 (causal) or 12 (full) L H h S for attention scores."""
    model = work.model
    head = model.vocab_size * model.hidden_size
    active = model.parameters(active=True) - head * (1 if model.tie_embeddings else 2) + head
    factor = {"none": 0, "causal": 6, "full": 12}[attention]
    return 6.0 * active + factor * model.num_layers * model.num_heads * model.head_dim * work.sequence_length
