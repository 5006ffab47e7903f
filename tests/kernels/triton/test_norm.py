from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import rms_norm
from moeforge.kernels.triton import norm
from moeforge.kernels.triton.rows import tile

from .compiling import ARCHITECTURES, cross_compile

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def exact(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> list[Tensor]:
    """Output and the two gradients in float64."""
    x, weight = (y.detach().double().requires_grad_() for y in (x, weight))
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return [out, *torch.autograd.grad(out, (x, weight), grad.double())]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 100), (1, 1), (2, 600), (70, 31), (7,)])
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype).to(device).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).to(device).requires_grad_()
    grad = torch.randn(shape).to(dtype).to(device)
    out = rms_norm(x, weight, 1e-5)
    ours = [out, *torch.autograd.grad(out, (x, weight), grad)]
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5), out)
    for a, b in zip(ours, exact(x, weight, grad, 1e-5), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * (1 + float(b.detach().abs().max())))


def test_rows_apart_and_expanded_gradients(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 4, 24, device=device)
    weight = torch.randn(8, device=device).requires_grad_()
    for x in (wide[:, 1:3, 8:16], wide.transpose(0, 2)[:8].transpose(0, 2), wide[:1, :1, :8].expand(5, 2, 8)):
        leaf = x.detach().requires_grad_()
        out = rms_norm(leaf, weight, 1e-6)
        for grad in (torch.ones((), device=device).expand(out.shape), torch.randn(8, device=device).expand(out.shape)):
            ours = torch.autograd.grad(out, (leaf, weight), grad, retain_graph=True)
            for a, b in zip(ours, exact(x, weight, grad, 1e-6)[1:], strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing(shape: tuple[int, ...], device: str) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1], device=device, requires_grad=True)
    out = rms_norm(x, weight, 1e-5)
    out.sum().backward()
    assert out.shape == shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_zero_row_stays_finite(device: str) -> None:
    x = torch.zeros(2, 4, device=device, requires_grad=True)
    weight = torch.ones(4, device=device, requires_grad=True)
    out = rms_norm(x, weight, 1e-5)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.isfinite(x.grad).all()


def test_a_row_has_the_same_bits_in_any_company_and_gradients_when_repeated(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "_PROGRAMS", 3)  # so that one has several turns
    torch.manual_seed(0)
    x, grad = torch.randn(2, 200, 40, device=device)
    weight = torch.randn(40, device=device)
    out, rstd = norm.rms_norm_forward(x, weight, 1e-5)
    for begin, end in ((0, 1), (77, 78), (3, 110)):
        assert torch.equal(norm.rms_norm_forward(x[begin:end], weight, 1e-5)[0], out[begin:end])
    first, second = (norm.rms_norm_backward(grad, x, weight, rstd) for _ in range(2))
    for a, b, c in zip(first, second, exact(x, weight, grad, 1e-5)[1:], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("columns", [128, 4608])
def test_compiles(architecture: int, columns: int) -> None:
    size = tile(columns, 4096)
    tiles = {"ROWS": size.rows, "COLUMNS": size.columns}
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "rstd_ptr": "*fp32", "rows": "i32", "columns": "i32"}
    strides = {"x_stride": "i32"}
    cross_compile(norm._forward, architecture, types | strides | {"out_ptr": "*bf16", "eps": "fp32"}, tiles, size.warps)
    types |= strides | {"grad_ptr": "*bf16", "grad_x_ptr": "*bf16", "partial_ptr": "*fp32", "grad_stride": "i32"}
    cross_compile(norm._backward, architecture, types | {"rows_each": "i32"}, tiles, size.warps)
