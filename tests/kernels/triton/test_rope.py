from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import rotate
from moeforge.kernels.triton import rope

from .compiling import ARCHITECTURES, cross_compile

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def angles(tokens: int, half: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """With a length factor, as yarn's are."""
    angle = 6 * torch.rand(tokens, 1, half)
    return tuple((1.3 * y).to(dtype).to(device) for y in (angle.cos(), angle.sin()))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.double().chunk(2, -1)
    cos, sin = cos.double(), sin.double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 1, 2), (3, 40, 128), (2, 7, 80), (4, 0, 8), (0, 2, 8)])
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).to(device).requires_grad_()
    cos, sin = angles(shape[0], shape[2] // 2, dtype, device)
    out = rotate(x, cos, sin)
    grad = torch.randn(shape).to(dtype).to(device)
    (ours,) = torch.autograd.grad(out, x, grad)
    assert out.dtype == ours.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), turned(x, cos, sin), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.double(), turned(grad, cos, -sin), rtol=tolerance, atol=tolerance)


def test_strided_inputs_and_an_expanded_gradient(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(3, 5, 12, device=device)
    cos, sin = angles(3, 4, torch.float32, device)
    for x in (wide[:, 1:3, :8], wide[:, ::2, 2:10], wide.transpose(1, 2)[:, :8].transpose(1, 2)):
        torch.testing.assert_close(rotate(x, cos, sin).double(), turned(x, cos, sin), rtol=1e-5, atol=1e-6)
    x = wide[..., :8].clone().requires_grad_()
    out = rotate(x, cos, sin)
    (ours,) = torch.autograd.grad(out, x, torch.ones((), device=device).expand_as(out))
    torch.testing.assert_close(ours.double(), turned(torch.ones_like(x), cos, -sin), rtol=1e-5, atol=1e-6)


def test_other_shapes_of_angles(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, device=device)
    cos, sin = (y.squeeze(1) for y in angles(2, 4, torch.float32, device))  # one for each head
    torch.testing.assert_close(rotate(x, cos, sin).double(), turned(x, cos, sin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(architecture: int) -> None:
    types = dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("heads", "half", "token_stride", "head_stride"), "i32")
    for backward in (False, True):
        cross_compile(rope._rotate, architecture, types, {"BACKWARD": backward, "HEADS": 32, "HALF": 64})
