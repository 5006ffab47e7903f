"""Expert similarity against the definition written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from moeforge.upcycle.similarity import expert_similarity


def by_definition(w13: torch.Tensor, w2: torch.Tensor) -> float:
    flat = [torch.cat([w13[e].flatten(), w2[e].flatten()]).double() for e in range(len(w13))]
    pairs = [cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(flat, 2)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("experts", [2, 3, 8])
@pytest.mark.parametrize(
    "dtype, tolerance", list({torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}.items())
)
def test_equals_mean_pairwise_cosine(experts: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(experts)
    shared = torch.randn(1, 24, 8)
    w13 = (shared + 0.7 * torch.randn(experts, 24, 8)).to(dtype)
    w2 = (3.0 * torch.randn(experts, 8, 12)).to(dtype)
    assert expert_similarity(w13, w2).item() == pytest.approx(by_definition(w13, w2), abs=tolerance)


def test_limits() -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(1, 64, 16), torch.randn(1, 16, 32)
    assert expert_similarity(w13, w2).item() == 1
    assert expert_similarity(w13.expand(4, -1, -1), w2.expand(4, -1, -1)).item() == pytest.approx(1, abs=1e-6)
    assert abs(expert_similarity(torch.randn(8, 64, 16), torch.randn(8, 16, 32)).item()) < 0.05
    zero = expert_similarity(torch.zeros(3, 4, 2), torch.zeros(3, 2, 2))
    assert torch.isfinite(zero)
