"""Cross-entropy of logits and its gradient: a program reads its row once for the maximum and the sum of exponentials,
and once more to write the gradient in its place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.triton.rows import tile

_COLUMNS = 4096


@triton.jit
def _extended(highest, total, x):
    """The largest logit and the sum of exp(logit - largest), with those of a block `x` added."""
    top = tl.maximum(highest, tl.max(x, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)  # nothing but -inf so far: a sum of 0, not of NaN
    return top, total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), 0)


@triton.jit
def _gradient(x, column, index, highest, scale, weight):
    """(softmax - one-hot) * weight; `scale` is weight / total."""
    return tl.exp(x - highest) * scale - tl.where(column == index, weight, 0.0)


@triton.jit
def _forward(logits_ptr, targets_ptr, loss_ptr, columns, stride, ignore, KEEP: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    weight = (target != ignore).to(tl.float32)
    index = tl.maximum(target, 0)
    # Before the loop, whose reductions keep the program's warps together: later the row is overwritten.
    picked = tl.load(logits_ptr + index, index < columns, other=float("nan")).to(tl.float32)

    # Whole blocks need no mask, and so are read in words of 16 bytes whatever the number of columns; the rest comes
    # first.
    block = tl.arange(0, COLUMNS)
    whole = columns // COLUMNS * COLUMNS
    rest, inside = whole + block, whole + block < columns
    x = tl.load(logits_ptr + rest, inside, other=float("-inf")).to(tl.float32)
    highest, total = _extended(float("-inf"), 0.0, x)
    for first in range(0, whole, COLUMNS):
        highest, total = _extended(highest, total, tl.load(logits_ptr + first + block).to(tl.float32))
    tl.store(loss_ptr + row, (highest - picked + tl.log(total)) * weight)

    if KEEP:
        scale = weight / total
        tl.store(logits_ptr + rest, _gradient(x, rest, index, highest, scale, weight), inside)
        for first in range(0, whole, COLUMNS):
            column = first + block
            x = tl.load(logits_ptr + column).to(tl.float32)
            tl.store(logits_ptr + column, _gradient(x, column, index, highest, scale, weight))


def softmax_minus_target(logits_RV: Tensor, targets_R: Tensor, ignore: int, keep: bool) -> Tensor:
    """Losses of the rows, float32 [R]; with `keep` the logits become their own gradients.

    Columns lie side by side; rows may be apart. Sums are in float32, and of a fixed order.
    """
    rows, columns = logits_RV.shape
    assert logits_RV.stride(1) == 1 or columns == 1
    losses = logits_RV.new_empty(rows, dtype=torch.float32)
    if rows:
        size = tile(columns, 1, _COLUMNS)
        _forward[(rows,)](
            logits_RV, targets_R.contiguous(), losses, columns, logits_RV.stride(0), ignore, keep, size.columns,
            num_warps=size.warps,
        )  # fmt: skip
    return losses
