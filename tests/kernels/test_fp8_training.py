from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import expert_mlp
from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.fp8_training import fp8_grouped_input_grad, fp8_grouped_matmul
from moeforge.kernels.swiglu import swiglu_backward, swiglu_forward

SIZES = [3, 0, 1, 5]


def rounded(x: Tensor, along: int) -> Tensor:
    """x in float64 with the numbers that e4m3 has, its largest magnitude along a dimension being 448."""
    x = x.double()
    scale = x.abs().amax(along, keepdim=True) / 448
    scale = torch.where(scale == 0, 1.0, scale).float().double()
    return (x / scale).float().to(E4M3).double() * scale


def by_hand(x: Tensor, weight_ENK: Tensor, sizes: list[int]) -> Tensor:
    experts = [e for e, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([rounded(weight_ENK[e], 1) @ row for e, row in zip(experts, rounded(x, 1), strict=True)])


def problem(sizes: list[int] = SIZES, d: int = 7, f: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    e, rows = len(sizes), sum(sizes)
    x = torch.randn(rows, d) * torch.logspace(-6, 6, rows).unsqueeze(1)  # rows of unequal size
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return x, torch.randn(e, 2 * f, d), torch.randn(e, d, f), offsets


def test_products_of_e4m3_numbers_with_a_scale_a_row() -> None:
    x, w13, _, offsets = problem()
    found = fp8_grouped_matmul(x, w13, offsets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(x, w13, SIZES), rtol=1e-5, atol=1e-9)
    error = (found - torch.stack([w13[e] @ row for e, row in zip([0, 0, 0, 2, 3, 3, 3, 3, 3], x, strict=True)])).norm(
        dim=1
    )
    assert (error / found.norm(dim=1) < 0.1).all() and (error > 0).all()


def test_the_input_gradient_has_a_scale_for_each_column_of_the_weight() -> None:
    _, w13, _, offsets = problem()
    grad = torch.randn(sum(SIZES), w13.shape[1])
    found = fp8_grouped_input_grad(grad, w13, offsets)
    torch.testing.assert_close(found.double(), by_hand(grad, w13.transpose(1, 2), SIZES), rtol=1e-5, atol=1e-9)


def test_weight_gradients_are_not_rounded_to_e4m3() -> None:
    x, w13, w2, offsets = problem([4, 2])
    leaves = [y.requires_grad_() for y in (x, w13, w2)]
    y = expert_mlp(*leaves, offsets, fp8=True)
    grad = torch.randn_like(y)
    y.backward(grad)
    with torch.no_grad():
        h = fp8_grouped_matmul(x, w13, offsets)
        a = swiglu_forward(h)
        torch.testing.assert_close(y, fp8_grouped_matmul(a, w2, offsets))
        grad_h = swiglu_backward(h, fp8_grouped_input_grad(grad, w2, offsets))[1]
        torch.testing.assert_close(x.grad, fp8_grouped_input_grad(grad_h, w13, offsets))
        for e, rows in enumerate((slice(0, 4), slice(4, 6))):
            torch.testing.assert_close(w13.grad[e], grad_h[rows].t() @ x[rows])
            torch.testing.assert_close(w2.grad[e], grad[rows].t() @ a[rows])


def test_rows_stand_alone_whatever_they_hold() -> None:
    x, w13, _, _ = problem()
    x[0], x[1], x[2], x[3, 0] = 0, 3e38, float("nan"), float("inf")
    offsets = torch.tensor([len(x), len(x), len(x), len(x)], dtype=torch.int32)
    found = fp8_grouped_matmul(x, w13, offsets)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert found[2].isnan().all() and found[3].isnan().all()
    alone = fp8_grouped_matmul(x[4:], w13, offsets - 4)
    assert torch.equal(found[4:], alone) and alone.isfinite().all()


def test_bf16_in_bf16_out_and_no_rows() -> None:
    x, w13, w2, offsets = problem([32, 0, 64, 32], d=32, f=16)
    small = [y.bfloat16() for y in (x, w13, w2)]
    assert expert_mlp(*small, offsets, fp8=True).dtype == torch.bfloat16
    assert expert_mlp(small[0][:0], *small[1:], torch.zeros_like(offsets), fp8=True).shape == (0, 32)


@pytest.mark.cuda
def test_scaled_grouped_matmul_computes_with_the_same_numbers() -> None:
    x, w13, _, offsets = (y.cuda() for y in problem([32, 0, 96, 64], d=128, f=64))
    x, w13 = x.bfloat16(), w13.bfloat16()
    grad = torch.randn_like(x)
    lefts = [(fp8_grouped_matmul, x), (fp8_grouped_matmul, torch.cat([grad, x], 1)[:, 128:])]
    lefts += [(fp8_grouped_input_grad, grad), (fp8_grouped_input_grad, grad[:1].expand(len(grad), -1))]
    for function, left in lefts:
        found = function(left, w13, offsets)
        wanted = function(left.cpu().float(), w13.cpu().float(), offsets.cpu())
        assert (found.cpu().float() - wanted).norm() < 5e-3 * wanted.norm()
