import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.kernels import rms_norm


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8), (1, 1), (0, 8)])
def test_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5), (x, weight))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-6, 6), st.floats(1e-8, 1e-2))
def test_equals_autograd_at_any_scale(seed: int, exponent: float, eps: float) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(4, 6, dtype=torch.float64) * 10**exponent).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 6, dtype=torch.float64)
    ours = torch.autograd.grad(rms_norm(x, weight, eps), (x, weight), grad)
    theirs = torch.autograd.grad(reference(x, weight, eps), (x, weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()) + 1e-300)


def test_a_zero_row_stays_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    out = rms_norm(x, weight, 1e-5)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


def test_bf16_rounds_where_llama_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64).bfloat16().requires_grad_()
    weight = torch.randn(64).bfloat16().requires_grad_()
    grad = torch.randn(16, 64).bfloat16()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    # One unit in the last place: the statistics may be summed in another order.
    torch.testing.assert_close(out, normed.bfloat16() * weight, rtol=2**-7, atol=0)
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    theirs = torch.autograd.grad(reference(*exact, 1e-6), exact, grad.double())
    ours = torch.autograd.grad(out, (x, weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-8 * float(b.abs().max()))
