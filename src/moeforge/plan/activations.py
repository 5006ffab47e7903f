"""Activation memory of one unit on one rank, byte by byte after the code that runs.

Every unit is written down twice as entries in a `Ledger`: its forward, with what autograd keeps of it, and its
backward, in the order in which torch's engine runs it. A gradient of a weight counts until it is added to the sum
that persists. The entries follow `model.units`, `parallel.shard`, `parallel.dispatcher` and the `kernels`: change
them together.

Not counted: tensors of a few numbers, token ids, and workspaces inside a kernel. Angles and attention masks, which the
units of a stage share, are in `stage_memory.shared_bytes`.

Legend: T tokens of a micro-batch, t a rank's share of them, D hidden, F columns, v vocabulary rows of a rank, g KV
groups of a rank, p query heads of each, h head dimension. Sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from moeforge.plan.expert_activations import RoutedFeedForward
from moeforge.plan.ledger import Ledger
from moeforge.plan.pieces import (
    INT64,
    Norm,
    Region,
    hidden_bytes,
    linear_backward,
    vocabulary_gradient_bytes,
    wide_width,
    width,
)
from moeforge.plan.workload import Workload

# Rows of logits at once, as on GPUs, of those that are widened at once, and columns that rows are filled up to
# multiples of: see `kernels.cross_entropy`. Rows at once over ranks: see `parallel.cross_entropy`.
_CHUNK, _BLOCK, _COLUMNS, _PARALLEL_CHUNK = 4096, 64, 64, 1024


@dataclass(frozen=True)
class UnitActivations:
    """Bytes on one rank for one micro-batch.

    `kept`: what autograd keeps between the unit's forward and its backward, its input included, its output not (that is
    the next unit's input). `checkpoint`: what it keeps where the unit is recomputed, its input. The transients are the
    most that is alive beyond `kept` while the forward runs, the output included, and while the backward runs, the
    gradients that come in and go out included.

    Where the backward pass is split, the one for the input frees nothing of `kept`. `input_transient` is the most that
    is alive beyond `kept` then, and `held_gradients` what waits of it for the one for the weights: the gradients of
    what weights made.
    """

    kept: int
    checkpoint: int
    forward_transient: int
    backward_transient: int
    input_transient: int
    held_gradients: int


class _Unit(Protocol):
    @property
    def held_gradients(self) -> float: ...

    def forward(self, ledger: Ledger) -> None:
        """From the input to the output and what is kept, the input included."""
        ...

    def backward(self, ledger: Ledger) -> None:
        """From the output's gradient and what is kept to the input's gradient."""
        ...


def unit_activations(work: Workload, unit: str) -> UnitActivations:
    """Of a unit by its name in `layout.unit_names`; "head" includes the cross-entropy."""
    x = 0 if unit == "embed" else hidden_bytes(work)
    y = 0 if unit == "head" else hidden_bytes(work)
    passes = _unit(work, unit)
    there = Ledger()
    there.take(x)
    passes.forward(there)
    kept = there.live - y
    back = Ledger()
    back.take(kept, y)
    passes.backward(back)
    assert abs(back.live - x) < 1, f"{unit}: the entries leave {back.live - x} bytes"
    norm = Ledger()  # runs last, when all gradients are held, the one that comes into it among them
    Norm(work, work.own_tokens, work.model.hidden_size).backward(norm)
    apart = max(back.peak - kept, passes.held_gradients + norm.peak)
    transients = round(there.peak - kept), round(back.peak - kept), round(apart)
    return UnitActivations(round(kept), x, *transients, round(passes.held_gradients))


def _unit(work: Workload, unit: str) -> _Unit:
    kind = unit.rpartition(".")[2]
    if kind == "ffn":
        routed = work.model.is_moe_layer(int(unit.split(".")[1]))
        return RoutedFeedForward(work) if routed else _FeedForward(work)
    if kind == "attention":
        return _Attention(work)
    return _Embedding(work) if kind == "embed" else _Head(work)


class _Embedding:
    """Keeps token ids and which of them are its own, where the vocabulary is split."""

    def __init__(self, work: Workload) -> None:
        self.region = Region(work)
        self.matrix = vocabulary_gradient_bytes(work)
        self.held_gradients = 0.0  # the first stage puts its whole backward off
        self.ids = 0 if work.tp == 1 else work.tokens * (INT64 + 1)

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.ids, self.region.inside)
        if self.ids:
            ledger.take(self.region.inside)  # with the others' rows set to zero
            ledger.free(self.region.inside)
        self.region.leave(ledger)

    def backward(self, ledger: Ledger) -> None:
        self.region.leave_backward(ledger)
        if self.ids:
            ledger.free(self.region.outside)
            ledger.take(self.region.inside)
            self.region.left(ledger)
        ledger.visit(self.matrix)
        ledger.free(self.ids, self.region.inside)


class _Attention:
    def __init__(self, work: Workload) -> None:
        c, w, wide = work.model, width(work), wide_width(work)
        g, p, h, d = work.kv_groups, c.heads_per_group, c.head_dim, c.hidden_size
        self.region, self.norm = Region(work), Norm(work, work.own_tokens, d)
        self.q, self.k = work.tokens * g * p * h * w, work.tokens * g * h * w
        self.qkv = self.q + 2 * self.k
        self.held_gradients = self.region.inside + self.qkv + self.region.outside
        self.qkv_weight, self.o_weight = g * (p + 2) * h * d * w, g * p * h * d * w
        self.logsumexp, self.half_angles = work.tokens * g * p * wide, work.tokens * h // 2 * w
        self.output_bias = c.output_bias
        # Cut out of qkv, heads are views of it where they can be.
        full = c.qk_norm == "full"
        self.q_copy = self.q if g > 1 and (p > 1 or full) else 0
        self.k_copy = self.k if g > 1 and full else 0
        self.norms: tuple[Norm, ...] = ()
        if full:
            self.norms = tuple(Norm(work, work.tokens, g * heads * h) for heads in (p, 1))
        elif c.qk_norm == "head":
            self.norms = tuple(Norm(work, work.tokens * g * heads, h) for heads in (p, 1))
        # Over ranks the norm is written out, and keeps what is widened and what is normalised.
        self.written_out = (self.q + self.k) * (1 + (wide // w if w != wide else 0)) if full and work.tp > 1 else 0

    def forward(self, ledger: Ledger) -> None:
        self.norm.forward(ledger)
        self.region.enter(ledger)
        ledger.take(self.qkv, self.q_copy, self.k_copy, self.written_out)
        for norm in self.norms:
            norm.forward(ledger)
        ledger.take(self.q, self.k)  # turned
        ledger.take(self.q, self.logsumexp, self.region.inside)
        self.region.leave(ledger)
        ledger.take(self.region.outside)
        ledger.free(self.region.outside)
        if self.output_bias:
            ledger.visit(self.region.outside)
        # What went into the turn is not kept: the norms' results, or else the copy of q.
        ledger.free(*((self.q, self.k) if self.norms else (self.q_copy,)))

    def backward(self, ledger: Ledger) -> None:
        self.region.leave_backward(ledger)
        linear_backward(ledger, self.o_weight, self.q)
        self.region.left(ledger)
        ledger.take(self.qkv)  # gradients of q, k and v
        ledger.free(self.q, self.q, self.logsumexp, self.q, self.k)
        norms_see_views = bool(self.norms) and not (self.q_copy and self.k_copy)
        if not norms_see_views:
            ledger.free(self.qkv)  # v was the last view of it
        for each in (self.k, self.q):
            ledger.take(self.half_angles, each)
            ledger.free(self.half_angles, each)
        for norm in reversed(self.norms):
            norm.backward(ledger)
        if self.norms:
            ledger.free(self.q_copy, self.k_copy, self.written_out, self.qkv if norms_see_views else 0)
        ledger.take(self.qkv)
        ledger.free(self.qkv)
        linear_backward(ledger, self.qkv_weight, self.region.inside)
        ledger.free(self.qkv, self.region.travelling)
        self.region.enter_backward(ledger)
        self.norm.backward(ledger)
        # Its input goes, and one of the two gradients of x, which are added in place.
        ledger.free(self.region.outside, self.region.outside)


class _FeedForward:
    def __init__(self, work: Workload) -> None:
        w, d, f = width(work), work.model.hidden_size, work.ffn_columns
        self.region, self.norm = Region(work), Norm(work, work.own_tokens, d)
        self.gated, self.weight = work.tokens * f * w, f * d * w
        self.held_gradients = self.region.inside + 2 * self.gated + self.region.outside

    def forward(self, ledger: Ledger) -> None:
        self.norm.forward(ledger)
        self.region.enter(ledger)
        ledger.take(2 * self.gated, self.gated, self.region.inside)
        self.region.leave(ledger)
        ledger.take(self.region.outside)
        ledger.free(self.region.outside)

    def backward(self, ledger: Ledger) -> None:
        self.region.leave_backward(ledger)
        linear_backward(ledger, self.weight, self.gated)
        self.region.left(ledger)
        ledger.free(self.gated)
        ledger.take(2 * self.gated)
        ledger.visit(self.gated)  # silu(gate)
        ledger.free(self.gated, 2 * self.gated)
        linear_backward(ledger, 2 * self.weight, self.region.inside)
        ledger.free(2 * self.gated, self.region.travelling)
        self.region.enter_backward(ledger)
        self.norm.backward(ledger)
        ledger.free(self.region.outside, self.region.outside)


class _Head:
    """Final norm and `kernels.cross_entropy`, or `parallel.cross_entropy` over ranks, which both make their gradients
    in the forward pass and keep them."""

    def __init__(self, work: Workload) -> None:
        w, wide = width(work), wide_width(work)
        self.region, self.norm = Region(work), Norm(work, work.own_tokens, work.model.hidden_size)
        self.matrix = vocabulary_gradient_bytes(work)
        self.held_gradients = self.region.outside
        chunk = min(_CHUNK if self.region.alone else _PARALLEL_CHUNK, work.tokens)
        columns = -(-work.vocab_rows // _COLUMNS) * _COLUMNS if self.region.alone else work.vocab_rows
        self.logits = chunk * columns * w
        self.again = min(chunk, work.tokens - chunk) * work.vocab_rows * w
        self.narrow = w != wide
        self.widened = self.logits // w * wide
        self.blocks = min(2 * _BLOCK, chunk) * work.vocab_rows * wide

    def forward(self, ledger: Ledger) -> None:
        self.norm.forward(ledger)
        if self.region.alone:
            ledger.take(self.region.inside)  # x's gradient
            ledger.take(self.logits)
            if self.narrow:
                ledger.visit(self.blocks)
            ledger.take(self.matrix)
            if self.narrow:  # of the next chunk, which takes the place of the last one
                ledger.visit(min(self.blocks, self.again * 2))
            ledger.free(self.logits, self.region.outside)
            return
        ledger.take(self.region.travelling, self.region.inside, self.matrix)
        ledger.take(self.logits)
        rest = self.logits  # a chunk's gradient, the logits themselves where they need not be widened
        if self.narrow:
            ledger.take(self.widened, self.logits)
            ledger.free(self.widened)
            rest = 2 * self.logits
        if self.again:
            ledger.take(self.again)
            ledger.free(self.logits)
            if self.narrow:
                ledger.visit(2 * self.again, self.again)
            ledger.take(self.logits)
            ledger.free(self.again)
        ledger.free(rest, self.region.travelling, self.region.outside)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.region.inside, self.matrix)
        ledger.free(self.region.inside, self.matrix, self.matrix)
        self.region.enter_backward(ledger)
        self.norm.backward(ledger)
        ledger.free(self.region.outside)
