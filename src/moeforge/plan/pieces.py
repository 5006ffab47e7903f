"""What the activations of several kinds of units are made of, as entries in a `Ledger`. Sizes in bytes.

Legend: T tokens of a micro-batch, t a rank's share of them, D hidden, v vocabulary rows of a rank.
"""

from __future__ import annotations

from moeforge.plan.ledger import Ledger
from moeforge.plan.workload import Workload

INT32, INT64 = 4, 8
_WIDTH = {"bf16": 2, "bf16_pure": 2, "fp32": 4, "fp64": 8}


def width(work: Workload) -> int:
    """Bytes of a number in an activation."""
    return _WIDTH[work.precision]


def wide_width(work: Workload) -> int:
    """The same of what is computed in higher precision (`kernels.precision.widen`)."""
    return max(4, width(work))


def hidden_bytes(work: Workload) -> int:
    """Hidden states of a micro-batch outside tensor-parallel regions, [t, D]."""
    return work.own_tokens * work.model.hidden_size * width(work)


def vocabulary_gradient_bytes(work: Workload) -> int:
    """The gradient of embedding or output matrix as one backward pass makes it, [v, D]."""
    return work.vocab_rows * work.model.hidden_size * width(work)


def linear_backward(ledger: Ledger, weight: float, x: float) -> None:
    """The gradients of weight and input are there at once; the weight's is then added up and goes."""
    ledger.take(weight, x)
    ledger.free(weight)


class Norm:
    """`kernels.norm` of `rows` of `columns` numbers, `x` bytes."""

    def __init__(self, work: Workload, rows: float, columns: int) -> None:
        w, wide = width(work), wide_width(work)
        self.narrow = w != wide
        self.x, self.wide, self.rstd = rows * columns * w, rows * columns * wide, rows * wide

    def forward(self, ledger: Ledger) -> None:
        """Adds the output, and what is kept besides the input."""
        if self.narrow:
            ledger.take(self.wide, self.rstd, self.wide, self.x)
            ledger.free(self.wide, self.wide)
        else:
            ledger.take(self.rstd, self.x)

    def backward(self, ledger: Ledger) -> None:
        """The output's gradient becomes the input's; the input itself is the caller's to free."""
        if self.narrow:
            ledger.take(self.wide, self.wide, self.wide)  # gradient, x, and x * rstd
            ledger.free(self.wide)
        else:
            ledger.take(self.wide)
        ledger.visit(self.wide)  # gradient * x * rstd, summed for the weight
        ledger.take(self.wide)  # gradient * weight
        if self.narrow:
            ledger.free(self.wide)
        ledger.visit(self.wide)  # times x * rstd, for the mean
        if self.narrow:
            ledger.take(self.x)
            ledger.free(self.wide)
        ledger.free(self.wide, self.x, self.rstd)


class Region:
    """Entering and leaving a tensor-parallel region: [t, D] outside, [T, D] inside.

    While they travel there are tp * t rows, which are copies where that is more than T.
    """

    def __init__(self, work: Workload) -> None:
        row = work.model.hidden_size * width(work)
        self.alone = work.tp == 1
        self.outside, self.inside = work.own_tokens * row, work.tokens * row
        self.travelling = work.own_tokens * work.tp * row
        self.filled = self.travelling if self.travelling > self.inside else 0

    def enter(self, ledger: Ledger) -> None:
        """`travelling` bytes instead of `outside`."""
        if not self.alone:
            ledger.take(self.travelling)
            ledger.free(self.outside)

    def enter_backward(self, ledger: Ledger) -> None:
        """The gradient [T, D] becomes [t, D]."""
        if not self.alone:
            ledger.take(self.filled, self.outside)
            ledger.free(self.filled, self.inside)

    def leave(self, ledger: Ledger) -> None:
        """Partial results [T, D] become sums [t, D]."""
        self.enter_backward(ledger)

    def leave_backward(self, ledger: Ledger) -> None:
        """Besides the gradient [t, D], which the residual path needs too, that of the partial results; see `left`."""
        if not self.alone:
            ledger.take(self.travelling)

    def left(self, ledger: Ledger) -> None:
        """The partial results' gradient has been used."""
        if not self.alone:
            ledger.free(self.travelling)
