from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.kernels import combine, expert_permutation, gather
from moeforge.kernels.permute import _ALIGNMENT_16_BIT as ALIGNMENT


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Tensor, int, Tensor | None]:
    """(experts_TK distinct within a token, E, kept_TK or None)."""
    e = draw(st.integers(1, 6))
    k = draw(st.integers(1, e))
    t = draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    skew = draw(st.sampled_from([0.0, 3.0, 30.0])) * torch.arange(e)
    experts = (torch.rand(t, e, generator=generator) + skew).argsort(-1)[:, :k]
    share = draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    kept = None if share is None else torch.rand(t, k, generator=generator) < share
    return experts, e, kept


def check(experts: Tensor, e: int, kept: Tensor | None) -> None:
    permutation = expert_permutation(experts, e, kept)
    rows = len(permutation.source_R)
    ends = permutation.offsets_E.tolist()
    assert permutation.offsets_E.dtype == torch.int32 and len(ends) == e
    assert ends[-1] == rows and rows % ALIGNMENT == 0
    starts = [0, *ends[:-1]]
    keep = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
    taken: dict[int, tuple[int, int]] = {}
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        held = [(t, k) for t, k in keep.nonzero().tolist() if experts[t, k] == expert]
        size = end - start
        assert size % ALIGNMENT == 0
        if expert < e - 1:
            assert size == -(-len(held) // ALIGNMENT) * ALIGNMENT
        else:
            assert size >= len(held)
        # Stable: in token order from the start of the group.
        assert [int(permutation.row_TK[t, k]) for t, k in held] == list(range(start, start + len(held)))
        taken |= {start + i: pair for i, pair in enumerate(held)}
    assert len(taken) == int(keep.sum())
    for row, (t, _) in taken.items():
        assert permutation.source_R[row] == t
    if rows:
        assert int(permutation.source_R.min()) >= 0 and int(permutation.source_R.max()) < len(experts)
    if not keep.all():
        dropped = permutation.row_TK[~keep].unique().tolist()
        assert dropped == [rows - 1] and rows - 1 not in taken


@settings(max_examples=80, deadline=None)
@given(assignments())
def test_every_kept_assignment_has_its_own_row_in_its_experts_group(
    case: tuple[Tensor, int, Tensor | None],
) -> None:
    check(*case)


@pytest.mark.parametrize("t", [0, 1, 31, 32, 33, 64])
@pytest.mark.parametrize("drop", [False, True])
def test_corners(t: int, drop: bool) -> None:
    kept = torch.arange(t).unsqueeze(1) % 2 == 0 if drop else None
    check(torch.zeros(t, 1, dtype=torch.int64), 1, kept)  # one expert
    check(torch.full((t, 1), 2), 4, kept)  # all tokens to one of four
    check(torch.full((t, 1), 3), 4, kept)  # to the last one


def dense_combine(x: Tensor, weights: Tensor, experts: Tensor, kept: Tensor | None, matrix: Tensor) -> Tensor:
    """Every expert on every token, then a weighted choice: what the buffer must give."""
    out = torch.einsum("td,edf->tef", x, matrix).tanh()
    if kept is not None:
        weights = weights.where(kept, 0.0)
    return (out.gather(1, experts.unsqueeze(2).expand(-1, -1, out.shape[2])) * weights.unsqueeze(2)).sum(1)


def through_buffer(x: Tensor, weights: Tensor, experts: Tensor, kept: Tensor | None, matrix: Tensor) -> Tensor:
    permutation = expert_permutation(experts, len(matrix), kept)
    if kept is not None:
        weights = weights.where(kept, 0.0)
    ends = permutation.offsets_E.tolist()
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    groups = gather(x, permutation).split(sizes)
    y = torch.cat([(rows @ m).tanh() for rows, m in zip(groups, matrix, strict=True)])
    return combine(y, weights, permutation)


@settings(max_examples=40, deadline=None)
@given(assignments().filter(lambda case: len(case[0])))
def test_gather_and_combine_against_dense_autograd(case: tuple[Tensor, int, Tensor | None]) -> None:
    experts, e, kept = case
    torch.manual_seed(0)
    x = torch.randn(len(experts), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(e, 3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for function in (through_buffer, dense_combine):
        out = function(x, weights, experts, kept, matrix)
        results.append([out, *torch.autograd.grad(out, (x, weights, matrix), grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_finite_differences() -> None:
    torch.manual_seed(0)
    experts = torch.tensor([[0, 2], [2, 1], [1, 0]])
    kept = torch.tensor([[True, False], [True, True], [False, True]])
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3, 2), (3, 2, 2))]
    for mask in (None, kept):
        assert torch.autograd.gradcheck(lambda x, w, m, mask=mask: through_buffer(x, w, experts, mask, m), leaves)


def test_no_tokens() -> None:
    for kept in (None, torch.zeros(0, 2, dtype=torch.bool)):
        x = torch.zeros(0, 3, requires_grad=True)
        permutation = expert_permutation(torch.zeros(0, 2, dtype=torch.int64), 4, kept)
        out = combine(gather(x, permutation) * 2, torch.zeros(0, 2), permutation)
        assert out.shape == (0, 3)
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == (0, 3)


def test_weights_keep_their_dtype_in_the_gradient() -> None:
    torch.manual_seed(0)
    y = torch.randn(64, 16).bfloat16().requires_grad_()
    weights = torch.rand(20, 2, requires_grad=True)
    experts = torch.rand(20, 2).argsort(-1)
    permutation = expert_permutation(experts, 2)
    out = combine(y, weights, permutation)
    assert out.dtype == torch.bfloat16
    grad = torch.randn(20, 16).bfloat16()
    out.backward(grad)
    exact = (y.detach().double()[permutation.row_TK] * grad.double().unsqueeze(1)).sum(-1)
    assert weights.grad.dtype == torch.float32
    torch.testing.assert_close(weights.grad.double(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()))
