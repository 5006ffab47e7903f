"""Feed-forward of many experts at once over an expert-sorted buffer.

Its backward pass has two halves, the gradient of the input and those of the weights. Schedules that split the backward
pass of a pipeline stage ask for them at different times, and autograd runs a node whole for any one of its gradients.
So each half is a node of its own, and the one they meet in (`_Join`) is where the weights' turn begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8_training import fp8_grouped_input_grad, fp8_grouped_matmul
from moeforge.kernels.grouped import grouped_input_grad, grouped_matmul, grouped_swiglu, grouped_weight_grad
from moeforge.kernels.permute import expert_rows
from moeforge.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

GroupedMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]


def expert_mlp_reference(x_RD: Tensor, w13: Tensor, w2: Tensor, offsets_E: Tensor) -> Tensor:
    """The plain loop over experts that `expert_mlp` must agree with; any dtype, autograd by torch."""
    outputs = [
        F.linear(swiglu(F.linear(x_RD[rows], up)), down)
        for rows, up, down in zip(expert_rows(offsets_E), w13.unbind(), w2.unbind(), strict=True)
    ]
    return torch.cat(outputs)


def expert_mlp(x_RD: Tensor, w13: Tensor, w2: Tensor, offsets_E: Tensor, fp8: bool = False) -> Tensor:
    """w2_e silu(gate) * up of each row's expert e.

    x_RD [R, D] sorted by expert, w13 [E, 2F, D] gate rows first, w2 [E, D, F], offsets_E int32 [E] end rows, the
    last one R. `fp8`: forward products and the input's gradient in 8-bit floats (see `fp8_training`). Between forward
    and backward the input and the up-projection [R, 2F] are kept; between the two halves of a split backward the
    up-projection's gradient too.
    """
    if use_triton(x_RD) and not fp8 and not torch.is_grad_enabled():
        return grouped_matmul(grouped_swiglu(x_RD, w13, offsets_E), w2, offsets_E)
    passes = _passes(x_RD, fp8)
    with torch.no_grad():
        y_RD, h = passes.forward(x_RD, w13, w2, offsets_E)
    if not torch.is_grad_enabled():
        return y_RD
    left = _Left()
    kept = x_RD.detach(), h, w13.detach(), w2.detach(), offsets_E
    # Made before the input's half, so that it runs after it: autograd takes the newest node that is ready.
    weights = _WeightHalf.apply(w13, w2, *kept, passes, left)
    return _Join.apply(y_RD, weights, _InputHalf.apply(x_RD, *kept, passes, left, weights.grad_fn))


class _Left:
    """What the input's half of a backward pass leaves for the weights' half: of `grad`, the output's gradient."""

    def __init__(self) -> None:
        self._found: tuple[Tensor, int, tuple[Tensor, ...]] | None = None

    def put(self, grad: Tensor, *found: Tensor) -> None:
        self._found = grad, grad._version, found

    def take(self, grad: Tensor) -> tuple[Tensor, ...] | None:
        """None if the input's half has not run, or with another gradient."""
        held, self._found = self._found, None
        if held is None or held[1] != grad._version or not _same(held[0], grad):
            return None
        return held[2]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class _WeightHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w13: Tensor, w2: Tensor, *rest: Any) -> Tensor:
        *kept, ctx.passes, ctx.left = rest
        ctx.save_for_backward(*kept)
        return kept[0].new_zeros(()).expand(kept[0].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.left.take(grads[0])
        if found is None:
            found = ctx.passes.both(grads[0], *ctx.saved_tensors)[1:]
        elif len(found) == 1:
            x, h, _, _, offsets = ctx.saved_tensors
            found = ctx.passes.weight_half(grads[0], *found, x, h, offsets)
        return *found, *[None] * 7


class _InputHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *kept, ctx.passes, ctx.left, ctx.weights = rest
        ctx.save_for_backward(*kept)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w13, w2, offsets = ctx.saved_tensors
        # Done together, the halves share the activation, and on CPUs the cache.
        if ctx.weights is not None and torch._C._will_engine_execute_node(ctx.weights):
            grad_x, *found = ctx.passes.both(grads[0], x, h, w13, w2, offsets)
        else:
            grad_x, *found = ctx.passes.input_half(grads[0], h, w13, w2, offsets)
        if ctx.weights is not None:
            ctx.left.put(grads[0], *found)
        return grad_x, *[None] * 8


class _Join(torch.autograd.Function):
    """y as a function of what the two halves are functions of."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        ctx.mark_dirty(y)  # or it would be a view, which pipeline schedules cannot detach
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        return None, grads[0], grads[0]


class _Passes(Protocol):
    """Forward and backward over tensors without gradients. h is the up-projection [R, 2F]."""

    def forward(self, x: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """y and h."""
        ...

    def input_half(self, grad: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and h, of that of y."""
        ...

    def weight_half(self, grad: Tensor, grad_h: Tensor, x: Tensor, h: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of w13 and w2."""
        ...

    def both(
        self, grad: Tensor, x: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, w13 and w2."""
        ...


@dataclass(frozen=True)
class _Grouped:
    """All experts at once, by grouped matmuls."""

    matmul: GroupedMatmul = grouped_matmul
    input_grad: GroupedMatmul = grouped_input_grad

    def forward(self, x: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        h = self.matmul(x, w13, offsets)
        return self.matmul(swiglu_forward(h), w2, offsets), h

    def input_half(self, grad: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        grad_h = swiglu_backward(h, self.input_grad(grad, w2, offsets))[1]
        return self.input_grad(grad_h, w13, offsets), grad_h

    def weight_half(self, grad: Tensor, grad_h: Tensor, x: Tensor, h: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        grad_w2 = grouped_weight_grad(grad, swiglu_forward(h), offsets)
        return grouped_weight_grad(grad_h, x, offsets), grad_w2

    def both(
        self, grad: Tensor, x: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The activation is computed again from h: it is half of h's size and cheap beside the matmuls.
        activation, grad_h = swiglu_backward(h, self.input_grad(grad, w2, offsets))
        grad_w2 = grouped_weight_grad(grad, activation, offsets)
        grad_w13 = grouped_weight_grad(grad_h, x, offsets)
        return self.input_grad(grad_h, w13, offsets), grad_w13, grad_w2


class _ByExpert:
    """One expert after the other, for CPUs: what lies between two matmuls is then still in the cache."""

    def forward(self, x: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        y, h = torch.empty_like(x), x.new_empty(x.shape[0], w13.shape[1])
        for e, rows in enumerate(expert_rows(offsets)):
            torch.mm(x[rows], w13[e].t(), out=h[rows])
            torch.mm(swiglu_forward(h[rows]), w2[e].t(), out=y[rows])
        return y, h

    def input_half(self, grad: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_h = grad.new_empty(grad.shape), torch.empty_like(h)
        for e, rows in enumerate(expert_rows(offsets)):
            grad_h[rows] = swiglu_backward(h[rows], grad[rows] @ w2[e])[1]
            torch.mm(grad_h[rows], w13[e], out=grad_x[rows])
        return grad_x, grad_h

    def weight_half(self, grad: Tensor, grad_h: Tensor, x: Tensor, h: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        experts, f2, d = len(offsets), h.shape[1], x.shape[1]
        grad_w13, grad_w2 = x.new_empty(experts, f2, d), x.new_empty(experts, d, f2 // 2)
        for e, rows in enumerate(expert_rows(offsets)):
            torch.mm(grad[rows].t(), swiglu_forward(h[rows]), out=grad_w2[e])
            torch.mm(grad_h[rows].t(), x[rows], out=grad_w13[e])
        return grad_w13, grad_w2

    def both(
        self, grad: Tensor, x: Tensor, h: Tensor, w13: Tensor, w2: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_x, grad_w13, grad_w2 = torch.empty_like(x), torch.empty_like(w13), torch.empty_like(w2)
        for e, rows in enumerate(expert_rows(offsets)):
            activation, grad_h = swiglu_backward(h[rows], grad[rows] @ w2[e])
            torch.mm(grad[rows].t(), activation, out=grad_w2[e])
            torch.mm(grad_h.t(), x[rows], out=grad_w13[e])
            torch.mm(grad_h, w13[e], out=grad_x[rows])
        return grad_x, grad_w13, grad_w2


_GROUPED, _FP8, _BY_EXPERT = _Grouped(), _Grouped(fp8_grouped_matmul, fp8_grouped_input_grad), _ByExpert()


def _passes(x: Tensor, fp8: bool) -> _Passes:
    if fp8:
        return _FP8
    return _BY_EXPERT if x.device.type == "cpu" else _GROUPED
