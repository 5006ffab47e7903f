from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeforge.kernels import swiglu as public
from moeforge.kernels import swiglu_invariant
from moeforge.kernels.triton import swiglu

from .compiling import ARCHITECTURES, cross_compile

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 14), (1, 2), (3, 2100), (301, 10), (8,)])
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    h = (4 * torch.randn(shape)).to(dtype).to(device).requires_grad_()
    wide = h.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    exact = F.silu(gate) * up
    out = public(h)
    again, _ = swiglu.swiglu_backward(h.detach(), torch.zeros_like(out))
    assert torch.equal(again, out) and torch.equal(swiglu_invariant(h.detach()), out)
    for grad in (torch.randn(exact.shape, device=device).to(dtype), torch.ones((), device=device).to(dtype)):
        grad = grad.expand(exact.shape)
        ours = out, *torch.autograd.grad(out, h, grad, retain_graph=True)
        theirs = exact, *torch.autograd.grad(exact, wide, grad.double(), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            tolerance, largest = TOLERANCE[dtype], float(b.detach().abs().max())
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (1 + largest))


def test_rows_apart(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 40, device=device)
    for h in (wide[::2, 3:23], wide.t()[:20].t(), wide[:1].expand(3, -1)):
        gate, up = h.chunk(2, -1)
        torch.testing.assert_close(swiglu.swiglu_forward(h), F.silu(gate) * up)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing(shape: tuple[int, ...], device: str) -> None:
    h = torch.zeros(shape, device=device, requires_grad=True)
    out = public(h)
    out.sum().backward()
    assert out.shape == (shape[0], shape[1] // 2) and h.grad.shape == shape


def test_saturated_gates_stay_finite(device: str) -> None:
    h = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=device, requires_grad=True)
    out = public(h)
    out.sum().backward()
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 3e4]]))
    torch.testing.assert_close(h.grad.cpu(), torch.tensor([[0.0, 3.0, 0.0, 1e4]]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture: int) -> None:
    types = {"h_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "columns": "i32", "h_stride": "i32"}
    tiles = {"ROWS": 2, "COLUMNS": 1024}
    cross_compile(swiglu._forward, architecture, types, tiles)
    types |= {"grad_ptr": "*bf16", "grad_h_ptr": "*bf16", "grad_stride": "i32"}
    cross_compile(swiglu._backward, architecture, types, tiles)
