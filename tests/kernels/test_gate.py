from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from moeforge.kernels import gate, normalize_logits
from moeforge.kernels.gate import MIN_STD

sizes = st.integers(3, 17)


@st.composite
def logits(draw: st.DrawFn, spread: float = 0.05) -> Tensor:
    """[T, E] float64 whose standard deviation is at least `spread` in every row."""
    shape = draw(st.integers(1, 4)), draw(sizes)
    z = torch.from_numpy(draw(arrays("float64", shape, elements=st.floats(-8, 8))))
    z[:, 0] += torch.where(z.std(-1) < spread, 1.0, 0.0)
    return z


def skywork_inference(z: Tensor, scale: float) -> Tensor:
    """The released inference code's formula: no mean, torch's (unbiased) std, no epsilon."""
    return z / (z.std(dim=1, keepdim=True) / scale)


@settings(max_examples=60, deadline=None)
@given(logits(), st.floats(0.1, 10), st.floats(-50, 50), st.floats(0.25, 4))
def test_shift_and_scale_invariance(z: Tensor, factor: float, shift: float, scale: float) -> None:
    normal = normalize_logits(z, scale)
    torch.testing.assert_close(normalize_logits(factor * z + shift, scale), normal, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(logits(), st.floats(0.25, 4))
def test_mean_zero_and_unbiased_std(z: Tensor, scale: float) -> None:
    normal = normalize_logits(z, scale)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(len(z), dtype=z.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close(normal.std(-1), torch.full((len(z),), scale, dtype=z.dtype), rtol=1e-9, atol=0)


@settings(max_examples=60, deadline=None)
@given(logits(), st.sampled_from([0.5, 1.0, 2.0]))
def test_agrees_with_the_released_inference_formula(z: Tensor, scale: float) -> None:
    ours = gate(z, 2, scale, renormalize=True)
    theirs = skywork_inference(z, scale)
    torch.testing.assert_close(ours.probabilities, theirs.softmax(-1), rtol=1e-9, atol=1e-12)
    weights = theirs.softmax(-1).topk(2).values
    torch.testing.assert_close(ours.weights, weights / weights.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)
    # The same derivative too: the mean matters to neither.
    grad = torch.randn_like(z)
    leaf = z.clone().requires_grad_()
    (a,) = torch.autograd.grad(gate(leaf, 2, scale, True).probabilities, leaf, grad)
    (b,) = torch.autograd.grad(skywork_inference(leaf, scale).softmax(-1), leaf, grad)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(logits(), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_largest_probability_is_bounded(z: Tensor, scale: float) -> None:
    """Reached by one expert above equal others: lambda (n - 1) / sqrt(n) against -lambda / sqrt(n)."""
    n = z.shape[-1]
    peak = math.exp(scale * math.sqrt(n))
    bound = peak / (peak + n - 1)
    chosen = gate(z, 1, scale, renormalize=False)
    assert chosen.logits.abs().max() <= scale * (n - 1) / math.sqrt(n) * (1 + 1e-9)
    assert chosen.probabilities.max() <= bound * (1 + 1e-9)
    one_hot = torch.zeros(1, n, dtype=z.dtype)
    one_hot[0, 0] = 3.0
    assert gate(one_hot, 1, scale, False).probabilities.max().item() == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("n, scale, bound", [(8, 0.5, 0.370), (8, 1, 0.707), (8, 2, 0.976), (16, 1, 0.784)])
def test_published_bounds(n: int, scale: float, bound: float) -> None:
    one_hot = torch.eye(n, dtype=torch.float64)[:1]
    assert gate(one_hot, 1, scale, False).probabilities.max().item() == pytest.approx(bound, abs=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
@pytest.mark.parametrize("learned", [False, True])
def test_equal_logits_give_a_uniform_gate_and_finite_gradients(dtype: torch.dtype, value: float, learned: bool) -> None:
    z = torch.full((3, 5), value, dtype=dtype, requires_grad=True)
    scale = torch.tensor(1.0, dtype=dtype, requires_grad=True) if learned else 1.0
    chosen = gate(z, 2, scale, renormalize=True)
    torch.testing.assert_close(chosen.probabilities, torch.full((3, 5), 0.2, dtype=dtype))
    torch.testing.assert_close(chosen.weights, torch.full((3, 2), 0.5, dtype=dtype))
    assert torch.equal(chosen.experts, torch.tensor([[0, 1]] * 3))
    (chosen.weights[:, 0].sum() + chosen.probabilities.square().sum()).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() <= 10 / MIN_STD
    if isinstance(scale, Tensor):
        assert torch.isfinite(scale.grad)


@settings(max_examples=40, deadline=None)
@given(st.floats(-12, 3), st.integers(0, 2**31))
def test_gradients_are_finite_at_any_spread(exponent: float, seed: int) -> None:
    torch.manual_seed(seed)
    z = (torch.randn(4, 6) * 10**exponent).requires_grad_()
    chosen = gate(z, 2, 1.0, renormalize=True)
    chosen.weights[:, 0].sum().backward()
    assert torch.isfinite(chosen.probabilities).all() and torch.isfinite(z.grad).all()


@settings(max_examples=60, deadline=None)
@given(logits(), st.sampled_from([None, 0.5, 1.0, 2.0]), st.data())
def test_softmax_then_top_k_equals_its_reverse(z: Tensor, scale: float | None, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, z.shape[-1]))
    chosen = gate(z, k, scale, renormalize=True)
    seen = z if scale is None else normalize_logits(z, scale)
    probabilities = seen.softmax(-1)
    torch.testing.assert_close(chosen.probabilities, probabilities, rtol=1e-12, atol=1e-15)
    kept = probabilities.gather(1, chosen.experts)
    torch.testing.assert_close(chosen.weights, kept / kept.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chosen.weights, seen.topk(k).values.softmax(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chosen.weights.sum(-1), torch.ones(len(z), dtype=z.dtype))
    raw = gate(z, k, scale, renormalize=False)
    torch.testing.assert_close(raw.weights, kept, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(arrays("int64", st.tuples(st.integers(1, 5), sizes), elements=st.integers(0, 2)), st.data())
def test_ties_break_by_expert_index(values: object, data: st.DataObject) -> None:
    z = torch.as_tensor(values).double()
    k = data.draw(st.integers(1, z.shape[-1]))
    expected = [sorted(range(z.shape[-1]), key=lambda e: (-row[e], e))[:k] for row in z.tolist()]
    for scale in (None, 1.0):
        assert gate(z, k, scale, renormalize=False).experts.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [None, 2.0, "parameter"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_dtype_stays(dtype: torch.dtype, scale: float | str | None, renormalize: bool) -> None:
    factor = torch.tensor(2.0, dtype=dtype) if scale == "parameter" else scale
    chosen = gate(torch.randn(3, 4, dtype=dtype), 2, factor, renormalize)
    assert {chosen.probabilities.dtype, chosen.logits.dtype, chosen.weights.dtype} == {dtype}


def test_lambda_as_parameter_is_the_same_function_with_a_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalize_logits(z, scale), normalize_logits(z, 1.5), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda a, b: gate(a, 2, b, True).weights, (z, scale))
    assert torch.autograd.gradcheck(lambda a, b: gate(a, 2, b, False).probabilities, (z, scale))
