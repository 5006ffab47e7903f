"""What every unit computes, moves through memory and sends: FLOPs, bytes and messages of one rank.

A multiply-add counts as 2 FLOPs. Legend: T tokens of a micro-batch, t a rank's own, D hidden, F columns, E experts,
K top-k, H heads, G KV groups, h head dimension, S positions, R expert rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moeforge.plan.memory import bytes_per_parameter, unit_kind
from moeforge.plan.static_memory import Replicas, copies, unit_parts
from moeforge.plan.workload import Workload

GroupName = Literal["tp", "block", "dp", "dp_tp", "expert_dp"]
Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]

ELEMENT_BYTES = {"bf16": 2, "bf16_pure": 2, "fp32": 4, "fp64": 8}
_INT64 = 8
# Rows of one collective of `parallel.cross_entropy`, elements of one of `parallel.zero`.
_HEAD_ROWS, _BUCKET = 1024, 32 * 2**20


class Matmul(NamedTuple):
    """`times` matmuls of `flops` each."""

    flops: float
    times: float = 1


class Message(NamedTuple):
    """Collectives in which each rank of `group` sends `bytes` to the others: so many `times`, below 1 where several
    units share one. `overlapped`: they travel behind the experts' computation."""

    group: GroupName
    operation: Operation
    bytes: float
    times: float = 1
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
    at once, which is less where both need the same; `update` happens once a step."""

    forward: Pass
    backward: Pass
    backward_input: Pass
    backward_weight: Pass
    update: Pass


def unit_cost(work: Workload, unit: str) -> UnitCost:
    """The work of one unit ("embed", "layers.3.attention", ...) on the rank that has most of it."""
    kind = unit_kind(work.model, unit)
    if kind == "attention":
        passes = _attention(work, work.model.window(int(unit.split(".")[1])))
    else:
        passes = {"embed": _embed, "dense ffn": _dense, "experts": _experts, "head": _head}[kind](work)
    forward, backward_input, backward_weight, together = passes
    return UnitCost(forward, together, backward_input, backward_weight, _update(work, unit))


_Passes = tuple[Pass, Pass, Pass, Pass]


def _enter_leave(work: Workload) -> tuple[Message, ...]:
    """Into and out of a tensor-parallel region; the backward mirrors it."""
    if work.tp == 1:
        return ()
    sent = work.own_tokens * work.model.hidden_size * _size(work) * (work.tp - 1)
    return Message("tp", "all_gather", sent), Message("tp", "reduce_scatter", sent)


def _all_reduce(group: GroupName, size: int, numel: int, element: int, times: int = 1) -> Message:
    """Of `numel` elements, `times`: a reduce-scatter and an all-gather of equal parts."""
    return Message(group, "all_reduce", 2.0 * times * (size - 1) * -(-numel // size) * element, times)


def _split(forward: Pass, messages: tuple[Message, ...], extra: tuple[Matmul, ...] = ()) -> _Passes:
    """Backward of linear maps: each once for its input, once for its weight; `extra` (attention scores) for the input
    alone. Elementwise passes read and write about twice what the forward did. `messages` are the backward's."""
    for_input = Pass(forward.matmuls + extra, 2 * forward.memory_bytes, messages)
    for_weight = Pass(forward.matmuls, 0.5 * forward.memory_bytes)
    return forward, for_input, for_weight, Pass(2 * forward.matmuls + extra, 2 * forward.memory_bytes, messages)


def _embed(work: Workload) -> _Passes:
    moved = 2 * work.own_tokens * work.model.hidden_size * _size(work)
    sent = _enter_leave(work)[1:]
    # Its gradient is scattered into a table of all rows, which is then added to the sum.
    table = work.vocab_rows * work.model.hidden_size * (_size(work) + 8)
    forward, backward = Pass((), moved, sent), Pass((), moved + table, tuple(_mirrored(m) for m in sent))
    return forward, Pass(), backward, backward


def _attention(work: Workload, window: int | None) -> _Passes:
    model, size = work.model, _size(work)
    t, d, h = work.tokens, model.hidden_size, model.head_dim
    heads, groups = work.kv_groups * model.heads_per_group, work.kv_groups
    qkv, out = Matmul(2.0 * t * d * (heads + 2 * groups) * h), Matmul(2.0 * t * heads * h * d)
    window = min(window or work.sequence_length, work.sequence_length)
    pairs = window * (work.sequence_length - (window - 1) / 2)  # causal: each position and those before it
    scores = Matmul(2.0 * pairs * h, 2.0 * heads * work.micro_batch_sequences)
    rows = 7 * work.own_tokens * d + t * h * (3 * heads + 3 * groups)
    messages = _enter_leave(work)
    if model.qk_norm == "full" and work.tp > 1:  # the ranks sum the squares of queries, and of keys
        messages += (_all_reduce("tp", work.tp, t, _wide(work), 2),)
    _, for_input, for_weight, together = _split(
        Pass((qkv, out), rows * size), messages,
        # Flash attention computes the scores again, then four products (Dao, 2023).
        (scores._replace(times=2.5 * scores.times),),
    )  # fmt: skip
    return Pass((qkv, out, scores), rows * size, messages), for_input, for_weight, together


def _dense(work: Workload) -> _Passes:
    t, d, columns = work.tokens, work.model.hidden_size, work.ffn_columns
    matmuls = Matmul(2.0 * t * d * 2 * columns), Matmul(2.0 * t * columns * d)
    moved = (7 * work.own_tokens * d + 3 * t * columns) * _size(work)
    messages = _enter_leave(work)
    return _split(Pass(matmuls, moved, messages), messages)


def _experts(work: Workload) -> _Passes:
    moe, d, size = work.model.moe, work.model.hidden_size, _size(work)
    assert moe is not None
    t, rows, columns = work.own_tokens, work.received_rows, work.expert_columns
    router = Matmul(2.0 * t * d * moe.num_experts)
    chunks = work.overlap_chunks if work.block > 1 else 1
    each, times = rows / max(1, work.experts) / chunks, work.experts * chunks
    grouped = Matmul(2.0 * each * d * 2 * columns, times), Matmul(2.0 * each * columns * d, times)
    # Norm, residual and sorting on own tokens; gathering, SwiGLU and combining on expert rows; gate in float32.
    moved = (9 * t * d + rows * (4 * d + 3 * columns)) * size + 20 * work.tokens * moe.num_experts * _wide(work)
    there, back = _dispatch(work)
    return _split(Pass((router, *grouped), moved, there + _statistics(work)), back)


def _dispatch(work: Workload) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Tokens to their experts and back (`parallel.dispatcher`), in the forward and in the backward pass."""
    if work.block == 1:
        return (), ()
    assert work.model.moe is not None
    t, k, c, others = work.own_tokens, work.model.moe.top_k, work.overlap_chunks, work.block - 1
    row = float(t * work.model.hidden_size * _size(work))
    if work.gathers_tokens:
        weights = Message("block", "all_gather", 1.0 * t * k * _wide(work) * others)
        experts = Message("block", "all_gather", 1.0 * t * k * _INT64 * others)
        both = Message("block", "all_gather", row * others), Message("block", "reduce_scatter", row * others)
        return (*both, weights, experts), (*both, _mirrored(weights))
    sent = row * k * work.etp * others / work.block * work.imbalance
    once = Message("block", "all_to_all", sent, c, c > 1)
    counts = Message("block", "all_gather", 1.0 * c * work.model.moe.num_experts * _INT64 * others)
    return (once, once, counts), (once, once)


def _statistics(work: Workload) -> tuple[Message, ...]:
    """Gate decisions that tensor-parallel ranks show one another: probabilities, both logits, experts."""
    if work.tp == 1:
        return ()
    assert work.model.moe is not None
    width = 3 * work.model.moe.num_experts + work.model.moe.top_k
    return (Message("tp", "all_gather", float(work.own_tokens * width * _wide(work) * (work.tp - 1))),)


def _head(work: Workload) -> _Passes:
    """The cross-entropy makes its gradients while the logits are there (`kernels.cross_entropy`)."""
    t, d, rows = work.tokens, work.model.hidden_size, work.vocab_rows
    logits = Matmul(2.0 * t * d * rows)
    enter, leave = _enter_leave(work) or (None, None)
    moved = 6 * work.own_tokens * d * _size(work) + t * rows * (3 * _size(work) + 8)
    forward = Pass((logits,) * 3, moved, () if enter is None else (enter, *_softmax(work)))
    # Its backward only scales what the forward has made; the matrix's gradient is then added to the sum.
    for_input = Pass((), 3 * t * d * _size(work), () if leave is None else (leave,))
    for_weight = Pass((), 3 * rows * d * _size(work) + 8 * rows * d)
    return forward, for_input, for_weight, for_input + for_weight


def _softmax(work: Workload) -> tuple[Message, ...]:
    """What the ranks tell one another of every row of logits: its maximum, then its sum and target logit."""
    whole, rest = divmod(work.tokens, _HEAD_ROWS)
    found = []
    for rows, times in ((_HEAD_ROWS, whole), (rest, 1)):
        if rows and times:
            found += [_all_reduce("tp", work.tp, width * rows, _wide(work), times) for width in (1, 2)]
    return tuple(found)


def _update(work: Workload, unit: str) -> Pass:
    """Gradient reduction over copies, optimiser on the own share, weights back to all (`parallel.zero`)."""
    each, wide = bytes_per_parameter(work.precision, work.optimizer), _wide(work)
    moved, messages = 0.0, list[Message]()
    groups: tuple[Replicas, ...] = ("dp", "dp_tp", "expert_dp")
    for group in groups:
        size = copies(work, group)
        numels = [part.numel for part in unit_parts(work, unit) if part.replicas == group]
        params = sum(numels)
        owned = sum(-(-numel // size) for numel in numels) if work.zero else params
        moved += params * (each.gradients + each.weights) + owned * (2 * each.optimizer + 2 * each.gradients)
        if size == 1 or not params:
            continue
        moved += 4 * params * wide  # packing and unpacking
        times = params / _BUCKET  # collectives are shared with other units
        if work.zero:
            sent = float(owned * (size - 1))
            messages.append(Message(group, "reduce_scatter", sent * wide, times))
            messages.append(Message(group, "all_gather", sent * each.weights, times))
        else:
            messages.append(_all_reduce(group, size, params, wide)._replace(times=times))
    return Pass((), moved, tuple(messages))


def _mirrored(message: Message) -> Message:
    return message._replace(operation="reduce_scatter" if message.operation == "all_gather" else "all_gather")


def _size(work: Workload) -> int:
    return ELEMENT_BYTES[work.precision]


def _wide(work: Workload) -> int:
    """Bytes of what is computed, or summed over ranks, in higher precision (`kernels.precision.widen`)."""
    return max(4, _size(work))


def model_flops_per_token(work: Workload, attention: Literal["none", "causal", "full"] = "causal") -> float:
    """FLOPs of training on one token, recomputation not counted: 6 for every weight that the token meets (of the
    embedding table none, of the head all), and 6 (causal) or 12 (full) L H h S for attention scores."""
    model = work.model
    head = model.vocab_size * model.hidden_size
    active = model.parameters(active=True) - head * (1 if model.tie_embeddings else 2) + head
    factor = {"none": 0, "causal": 6, "full": 12}[attention]
    return 6.0 * active + factor * model.num_layers * model.num_heads * model.head_dim * work.sequence_length
