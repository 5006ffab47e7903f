from __future__ import annotations

import statistics

import pytest
import torch

from moeforge.bench import expert_training
from moeforge.bench.expert_training import compare, plain
from moeforge.kernels import expert_mlp


def test_the_sides_compute_the_same() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((8, 16), (2, 48, 16), (2, 16, 24))]
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    theirs, ours = plain(*leaves, offsets), expert_mlp(*leaves, offsets)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("even", [False, True])
def test_the_ratio_is_of_rounds(monkeypatch: pytest.MonkeyPatch, even: bool) -> None:
    monkeypatch.setattr(expert_training, "_D", 16)
    monkeypatch.setattr(expert_training, "_F", 24)
    rows = list[list[int]]()

    def seen(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        rows.append(offsets.diff(prepend=offsets.new_zeros(1)).tolist())
        return expert_mlp(x, w13, w2, offsets)

    monkeypatch.setattr(expert_training, "expert_mlp", seen)
    found = compare(512, even, rounds=3)
    assert len(found["rounds"]) == 3 and found["rows"] == ("even" if even else "routed")
    assert found["ratio"] == statistics.median(sum(theirs) / sum(ours) for theirs, ours in found["rounds"])
    assert all(count % 32 == 0 for counts in rows for count in counts)  # as the dispatcher fills them up
    assert (len({tuple(counts) for counts in rows}) == 1) == even
