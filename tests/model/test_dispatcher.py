from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import expert_mlp_reference
from moeforge.model import LocalDispatcher


def problem(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.rand(tokens, 4).argsort(1)[:, :2]
    w13 = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    return x, weights, experts, w13, w2


@pytest.mark.parametrize("dropping", [False, True])
def test_weighted_sum_of_the_kept_experts(dropping: bool) -> None:
    x, weights, experts, w13, w2 = problem()
    kept = torch.rand(9, 2) < 0.5 if dropping else None
    out = LocalDispatcher().route(
        0, x, weights, experts, kept, 4, lambda rows, offsets: expert_mlp_reference(rows, w13, w2, offsets)
    )
    expected = torch.zeros_like(x)
    for t in range(9):
        for k in range(2):
            if kept is None or kept[t, k]:  # what is dropped is not made up for by the others
                e = experts[t, k]
                gate, up = (w13[e] @ x[t]).chunk(2)
                delta = torch.zeros_like(x)
                delta[t] = 1
                expected = expected + delta * weights[t, k] * (w2[e] @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    leaves = (x, weights, w13, w2)
    grad = torch.randn_like(x)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_nothing_kept_is_zero() -> None:
    x, weights, experts, w13, w2 = problem()
    none = torch.zeros(9, 2, dtype=torch.bool)
    out = LocalDispatcher().route(
        0, x, weights, experts, none, 4, lambda rows, offsets: expert_mlp_reference(rows, w13, w2, offsets)
    )
    assert torch.equal(out, torch.zeros_like(x))
    out.sum().backward()
    for leaf in (x, weights, w13, w2):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
