from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeforge.kernels import router_logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_is_float32_of_wide_copies(dtype: torch.dtype, weight_dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(7, 40), (5, 40), (5,)][: 3 if bias else 2]
    types = dtype, weight_dtype, weight_dtype
    leaves = [torch.randn(s).to(t).requires_grad_() for s, t in zip(shapes, types, strict=False)]
    ours, theirs = router_logits(*leaves), F.linear(*(leaf.float() for leaf in leaves))
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    grad = torch.randn(7, 5)
    found, expected = (torch.autograd.grad(y, leaves, grad) for y in (ours, theirs))
    for leaf, a, b in zip(leaves, found, expected, strict=True):
        assert a.dtype == leaf.dtype and torch.equal(a, b)


def test_float64_is_float64_throughout() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((4, 6), (3, 6), (3,))]
    assert router_logits(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(router_logits, leaves)
