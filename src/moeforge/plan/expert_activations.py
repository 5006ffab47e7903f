"""Activation memory of a routed feed-forward: router, dispatcher and experts, as entries in a `Ledger`.

Legend: T tokens of a micro-batch, t a rank's share of them, D hidden, E experts, e those of a rank, F columns of each,
K top-k, N = t K assignments, b ranks of a block, R rows that a rank computes. Sizes in bytes.
"""

from __future__ import annotations

from moeforge.plan.ledger import Ledger
from moeforge.plan.pieces import INT32, INT64, Norm, hidden_bytes, wide_width, width
from moeforge.plan.workload import Workload

# Rows at which expert groups start for 16-bit numbers: see `kernels.permute`.
_ALIGNMENT = 32


class RoutedFeedForward:
    """`model.units.MoEFeedForward` with capacity not dropping, whatever the dispatcher of the expert mode."""

    def __init__(self, work: Workload) -> None:
        self.hidden = hidden_bytes(work)
        self.norm = Norm(work, work.own_tokens, work.model.hidden_size)
        self.router = _Router(work)
        if work.block == 1:
            self.route: _Local | _AllGather | _AllToAll = _Local(work)
        elif work.gathers_tokens:
            self.route = _AllGather(work)
        else:
            self.route = _AllToAll(work)
        self.held_gradients = self.route.experts.held_gradients + self.router.logits + self.hidden

    def forward(self, ledger: Ledger) -> None:
        self.norm.forward(ledger)
        self.router.forward(ledger)
        self.route.forward(ledger)
        ledger.take(self.hidden)  # x + routed
        ledger.free(self.hidden)
        if self.router.narrow:  # the experts' buffer is a copy of it, and the router keeps a wider one
            ledger.free(self.hidden)

    def backward(self, ledger: Ledger) -> None:
        self.route.backward(ledger)
        self.router.backward(ledger)
        self.norm.backward(ledger)
        ledger.free(self.hidden, self.hidden)


class _Router:
    """`model.router`, with the statistics that training always takes. As on CPUs, where 16-bit inputs and weights are
    widened; GPUs multiply them as they are, and keep less."""

    def __init__(self, work: Workload) -> None:
        moe, wide = work.model.moe, wide_width(work)
        assert moe is not None
        t, d, e, k = work.own_tokens, work.model.hidden_size, moe.num_experts, moe.top_k
        self.narrow = width(work) != wide
        self.hidden, self.wide = hidden_bytes(work), t * d * wide
        self.weight = e * d * wide
        self.logits = t * e * wide
        # Softmax's result, and of the normalisation its centred logits and four columns; the gather of the chosen ones
        # keeps what it chooses from, and the sort's indices, [t, E], live on in their first K columns.
        self.kept = 2 * self.logits + t * e * INT64 + t * k * wide
        if moe.gate_norm is not None:
            self.kept += self.logits + 4 * t * wide
        self.valid = work.tokens * wide
        # Which expert each assignment of all T tokens goes to: of every expert a bool, which a sum makes an int32.
        self.counting = work.tokens * k * (e * (1 + INT32) + INT64)
        self.gathered = 0.0 if work.tp == 1 else work.own_tokens * work.tp * (3 * e + k) * wide

    def forward(self, ledger: Ledger) -> None:
        if self.narrow:
            ledger.take(self.wide, self.weight)
        ledger.take(self.kept, self.valid)
        ledger.visit(self.logits, self.gathered, self.counting)

    def backward(self, ledger: Ledger) -> None:
        """From the gradients of x as routed and of the weights, to that of x."""
        ledger.visit(4 * self.logits)
        ledger.free(self.kept, self.valid)
        ledger.visit(self.weight, self.wide)
        if self.narrow:
            ledger.free(self.wide, self.weight)
            ledger.take(self.wide)
            ledger.take(self.hidden)
            ledger.free(self.wide)
            ledger.free(self.hidden)  # the two gradients are added in place
        else:
            ledger.visit(self.hidden)
            ledger.free(self.hidden)


class _Products:
    """Grouped matmuls, and what those in FP8 hold besides (`kernels.fp8_training`, as on sm_90): both operands in e4m3.
    Scales, one a row, are not counted, nor, on CPUs, the wide copies that rounding makes."""

    def __init__(self, work: Workload) -> None:
        self.rounded = 1 / width(work) if work.expert_precision == "fp8" else 0.0

    def take(self, ledger: Ledger, weight: float, x: float, out: float) -> None:
        """A product of `out` bytes of a weight and an x of so many."""
        ledger.take(weight * self.rounded, x * self.rounded, out)
        ledger.free(weight * self.rounded, x * self.rounded)


class _Experts:
    """`kernels.experts` over the buffer of `rows` rows, [R, D], by grouped matmuls; on CPUs, where experts take turns,
    a little less is alive at once."""

    def __init__(self, work: Workload, rows: float) -> None:
        w, d, f = width(work), work.model.hidden_size, work.expert_columns
        self.x, self.gated, self.weight = rows * d * w, rows * f * w, work.experts * f * d * w
        self.held_gradients = self.x + 2 * self.gated
        self.products = _Products(work)

    def forward(self, ledger: Ledger) -> None:
        """Adds the output, besides x and what is kept."""
        self.products.take(ledger, 2 * self.weight, self.x, 2 * self.gated)
        ledger.take(self.gated)
        self.products.take(ledger, self.weight, self.gated, self.x)
        ledger.free(self.gated)

    def backward(self, ledger: Ledger) -> None:
        """The output's gradient becomes the input's, which is kept no longer."""
        self.products.take(ledger, self.weight, self.x, self.gated)  # gradient of the activation
        ledger.take(2 * self.gated, self.gated)
        ledger.free(self.gated)
        ledger.take(self.weight, 2 * self.weight)
        self.products.take(ledger, 2 * self.weight, 2 * self.gated, self.x)
        # The activation, gradient and original of the up-projection, input and output's gradient; weights' gradients.
        ledger.free(self.gated, 2 * self.gated, 2 * self.gated, self.x, self.x, 3 * self.weight)


class _Combine:
    """`kernels.permute.combine` of `tokens` tokens from a buffer of `buffer` bytes."""

    def __init__(self, work: Workload, tokens: float, buffer: float) -> None:
        moe = work.model.moe
        assert moe is not None
        self.several = moe.top_k > 1
        self.out = tokens * work.model.hidden_size * width(work)
        self.wide = tokens * work.model.hidden_size * wide_width(work)
        self.narrow, self.buffer = self.wide != self.out, buffer

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.out)
        if self.several:
            ledger.visit(self.out)

    def backward(self, ledger: Ledger) -> None:
        """Beside the output's gradient, that of the buffer, which is kept no longer."""
        widened = self.wide if self.narrow else 0
        ledger.take(widened, self.buffer)
        ledger.visit(self.wide, self.wide)  # a choice's rows, and their product with the gradient
        ledger.free(widened, self.buffer)

    # The gradient of tokens from that of the buffer (`gather`), which the caller frees, is the same sum over choices.
    gather_backward = forward


def padding_rows(work: Workload) -> float:
    """Rows of a buffer that no assignment fills: half an alignment for each 16-bit expert on average, and those that
    the all-gather's dropped assignments share."""
    alignment = _ALIGNMENT if width(work) == 2 else 1
    chunks = 1 if work.block == 1 else work.overlap_chunks
    return chunks * work.experts * (alignment - 1) / 2 + (alignment if work.gathers_tokens else 0)


class _Local:
    """`model.dispatcher.LocalDispatcher`."""

    def __init__(self, work: Workload) -> None:
        moe = work.model.moe
        assert moe is not None
        n = work.own_tokens * moe.top_k
        rows = n + padding_rows(work)
        self.index, self.source = n * INT64, rows * INT64
        self.experts = _Experts(work, rows)
        self.combine = _Combine(work, work.own_tokens, self.experts.x)

    def forward(self, ledger: Ledger) -> None:
        ledger.visit(6 * self.index)
        ledger.take(self.index, self.source, self.experts.x)
        self.experts.forward(ledger)
        self.combine.forward(ledger)
        ledger.free(self.source)

    def backward(self, ledger: Ledger) -> None:
        self.combine.backward(ledger)
        self.experts.backward(ledger)
        self.combine.gather_backward(ledger)
        ledger.free(self.experts.x, self.index)


class _AllGather:
    """`parallel.dispatcher.AllGatherDispatcher`: the buffers are of the b t tokens of the block."""

    def __init__(self, work: Workload) -> None:
        moe = work.model.moe
        assert moe is not None
        tokens = work.own_tokens * work.block
        n = tokens * moe.top_k
        rows = work.received_rows + padding_rows(work)
        self.hidden, self.all_hidden = hidden_bytes(work), hidden_bytes(work) * work.block
        self.index, self.source, self.mine, self.weights = n * INT64, rows * INT64, n, n * wide_width(work)
        self.experts = _Experts(work, rows)
        self.combine = _Combine(work, tokens, self.experts.x)

    def forward(self, ledger: Ledger) -> None:
        ledger.take(self.all_hidden, self.weights, self.index, self.mine, self.index)
        ledger.visit(6 * self.index)
        ledger.take(self.source, self.index, self.experts.x)
        self.experts.forward(ledger)
        ledger.take(self.weights)
        self.combine.forward(ledger)
        ledger.take(self.hidden)
        ledger.free(self.all_hidden, self.all_hidden, self.weights, 2 * self.index, self.source)

    def backward(self, ledger: Ledger) -> None:
        ledger.take(self.all_hidden)
        self.combine.backward(ledger)
        ledger.free(self.all_hidden)
        self.experts.backward(ledger)
        self.combine.gather_backward(ledger)
        ledger.free(self.experts.x)
        ledger.take(self.hidden)
        ledger.free(self.all_hidden, self.index, self.weights, self.mine)


class _AllToAll:
    """`parallel.dispatcher.AllToAllDispatcher`: buffers of the N own assignments, of the etp copies of each that are
    sent, and of the R received ones, in the order of arrival and again sorted and filled up.

    Those of all chunks count together: what one chunk frees early, the others' travelling rows take.
    """

    def __init__(self, work: Workload) -> None:
        moe, row = work.model.moe, work.model.hidden_size * width(work)
        assert moe is not None
        n, received = work.own_tokens * moe.top_k, work.received_rows
        self.copies = work.etp > 1
        self.index, self.received_index = n * INT64, received * INT64
        self.sent_index = n * work.etp * INT64 if self.copies else 0
        self.own, self.sent, self.received = n * row, n * work.etp * row, received * row
        self.experts = _Experts(work, received + padding_rows(work))
        self.combine = _Combine(work, work.own_tokens, self.own)

    def forward(self, ledger: Ledger) -> None:
        ledger.visit(6 * self.index)
        ledger.take(2 * self.index, self.received_index, self.sent_index, self.own)
        if self.copies:
            ledger.take(self.sent)
            ledger.free(self.own)
        ledger.take(self.received)
        ledger.free(self.sent)
        ledger.visit(6 * self.received_index)
        ledger.take(2 * self.received_index, self.experts.x)
        self.experts.forward(ledger)
        ledger.take(self.received)
        ledger.free(self.experts.x, self.received_index)
        ledger.take(self.sent)  # what comes back
        if self.copies:
            ledger.take(self.own, self.own)  # summed over the copies, and joined
            ledger.free(self.own)
        self.combine.forward(ledger)
        if self.copies:
            ledger.free(self.sent)
        ledger.free(self.received, self.received, self.index, self.received_index)

    def backward(self, ledger: Ledger) -> None:
        self.combine.backward(ledger)
        ledger.take(self.received)
        ledger.free(self.own)
        ledger.take(self.experts.x)
        ledger.visit(self.experts.x)  # zeros, to which rows are added out of place
        ledger.free(self.received, self.received_index)
        self.experts.backward(ledger)
        ledger.take(self.received)
        ledger.free(self.experts.x)
        ledger.take(self.sent)
        ledger.free(self.received)
        if self.copies:
            ledger.take(self.own)
            ledger.free(self.sent, self.sent_index)
        self.combine.gather_backward(ledger)
        ledger.free(self.own, self.index)
