from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.model import DenseAttention


def by_hand(q: Tensor, k: Tensor, v: Tensor, b: int, s: int, documents: Tensor | None, window: int | None) -> Tensor:
    """Token by token, head by head."""
    out = torch.zeros_like(q)
    per_group = q.shape[1] // max(k.shape[1], 1)
    for row in range(b):
        for i in range(s):
            seen = [
                row * s + j
                for j in range(i + 1)
                if (window is None or i - j < window) and (documents is None or documents[row, j] == documents[row, i])
            ]
            for head in range(q.shape[1]):
                keys, values = k[seen, head // per_group], v[seen, head // per_group]
                scores = (keys @ q[row * s + i, head]) / q.shape[2] ** 0.5
                out[row * s + i, head] = scores.softmax(0) @ values
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([None, 1, 2, 4, 100]),
    st.sampled_from([(4, 2), (3, 3), (2, 1)]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_against_a_loop(b: int, s: int, window: int | None, heads: tuple[int, int], packed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    documents = None
    if packed:  # rising ids, padding (-1) at the end of some rows
        documents = (torch.rand(b, s) < 0.4).cumsum(1)
        documents[0, s // 2 :] = -1
    q = torch.randn(b * s, heads[0], 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(b * s, heads[1], 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = DenseAttention(b, s, documents).attend(0, q, k, v, window)
    expected = by_hand(q, k, v, b, s, documents, window)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_one_context_serves_layers_with_different_windows() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 4, dtype=torch.float64)
    context = DenseAttention(2, 6)
    for layer, window in enumerate([3, None, 2, 3, 6]):
        out = context.attend(layer, q, k, v, window)
        torch.testing.assert_close(out, by_hand(q, k, v, 2, 6, None, window))


def test_packed_documents_equal_separate_ones() -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 4]
    q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    out = DenseAttention(1, sum(lengths), documents).attend(0, q, k, v, None)
    parts = [
        DenseAttention(1, n).attend(0, a, b, c, None)
        for n, a, b, c in zip(lengths, q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("b, s, heads", [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
@pytest.mark.parametrize("window", [None, 2])
def test_nothing_to_attend(b: int, s: int, heads: int, window: int | None) -> None:
    q, k, v = (torch.zeros(b * s, heads, 4, requires_grad=True) for _ in range(3))
    out = DenseAttention(b, s).attend(0, q, k, v, window)
    assert out.shape == (b * s, heads, 4)
    out.sum().backward()


def test_padding_sees_only_itself_and_stays_finite() -> None:
    torch.manual_seed(0)
    documents = torch.tensor([[-1, -1, -1], [0, 0, -1]])
    q, k, v = torch.randn(3, 6, 2, 4)
    out = DenseAttention(2, 3, documents).attend(0, q, k, v, None)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[5], v[5])
