from __future__ import annotations

import pytest
import torch

from moeforge.kernels import rotate, split_qkv
from moeforge.kernels.triton import qkv

from .compiling import ARCHITECTURES, cross_compile

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(5, 2, 4, 8), (1, 1, 3, 2), (3, 3, 18, 80), (2, 4, 3, 6), (0, 2, 4, 8), (3, 0, 4, 8)]
)
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(shape).to(dtype).to(device).requires_grad_()
    cos, sin = (1.3 * torch.rand(2, shape[0], 1, shape[3] // 2) - 0.6).to(dtype).to(device)
    ours = qkv.split_rotated_qkv(fused, cos, sin)
    exact = fused.detach().double().requires_grad_()
    q, k, v = split_qkv(exact)
    theirs = [rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double()), v]
    grads = [torch.randn(q.shape, device=device).to(dtype), *torch.randn(2, *k.shape, device=device).to(dtype)]
    grads[2] = grads[2][:1, :1].expand(v.shape) if v.numel() else grads[2]
    found = *ours, *torch.autograd.grad(ours, fused, grads)
    expected = *theirs, *torch.autograd.grad(theirs, exact, [grad.double() for grad in grads])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_part_of_a_wider_tensor(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(4, 2, 5, 12, device=device)
    cos, sin = torch.rand(2, 4, 1, 4, device=device)
    q, k, v = split_qkv(wide[..., :8])
    for a, b in zip(
        qkv.split_rotated_qkv(wide[..., :8], cos, sin), (rotate(q, cos, sin), rotate(k, cos, sin), v), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("backward", [False, True])
def test_compiles(backward: bool, architecture: int) -> None:
    types = dict.fromkeys(("fused_ptr", "q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr"), "*bf16")
    constants = {"PER_GROUP": 8, "BACKWARD": backward, "HEADS": 32, "HALF": 64}
    cross_compile(qkv._split, architecture, types | {"groups": "i32", "half": "i32"}, constants)
