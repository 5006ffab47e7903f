from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import expert_mlp, expert_mlp_reference, grouped
from moeforge.kernels.fp8_experts import fp8_expert_mlp
from moeforge.kernels.fp8_weight import fp8_expert_mlp_reference

from .test_grouped_matmul import assert_near, fp8_weight


@torch.inference_mode()
def test_inference_never_writes_the_up_projection(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfused(h: Tensor) -> Tensor:
        raise AssertionError(f"{h.shape} was written")

    monkeypatch.setattr(grouped, "swiglu_forward", unfused)
    torch.manual_seed(0)
    x, offsets = torch.randn(9, 40, device=device), torch.tensor([3, 3, 9], dtype=torch.int32, device=device)
    w13, w2 = torch.randn(3, 2 * 24, 40, device=device), torch.randn(3, 40, 24, device=device)
    exact = expert_mlp_reference(x.double(), w13.double(), w2.double(), offsets)
    assert_near(expert_mlp(x, w13, w2, offsets), exact, 1e-5)
    up, down = fp8_weight(3, 2 * 24, 40, "block", device), fp8_weight(3, 40, 24, "block", device)
    assert_near(fp8_expert_mlp(x, up, down, offsets), fp8_expert_mlp_reference(x.double(), up, down, offsets), 1e-5)
