from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode

from moeforge.kernels import expert_mlp, expert_mlp_reference, experts

D, F = 16, 24


def problem(sizes: list[int], dtype: torch.dtype, seed: int = 0, d: int = D, f: int = F) -> list[Tensor]:
    torch.manual_seed(seed)
    e = len(sizes)
    x = torch.randn(sum(sizes), d)
    w13, w2 = torch.randn(e, 2 * f, d) / d**0.5, torch.randn(e, d, f) / max(f, 1) ** 0.5
    leaves = [y.to(dtype).requires_grad_() for y in (x, w13, w2)]
    return [*leaves, torch.tensor(sizes).cumsum(0).to(torch.int32)]


def by_hand(x: Tensor, w13: Tensor, w2: Tensor, sizes: list[int]) -> Tensor:
    """Row by row, in float64."""
    rows = []
    experts = [e for e, size in enumerate(sizes) for _ in range(size)]
    for row, e in zip(x.double(), experts, strict=True):
        gate, up = (w13[e].double() @ row).chunk(2)
        rows.append(w2[e].double() @ (gate * torch.sigmoid(gate) * up))
    return torch.stack(rows)


def test_reference_against_rows_by_hand_and_finite_differences() -> None:
    sizes = [2, 0, 3]
    x, w13, w2, offsets = problem(sizes, torch.float64, d=3, f=2)
    torch.testing.assert_close(expert_mlp_reference(x, w13, w2, offsets), by_hand(x, w13, w2, sizes))
    assert torch.autograd.gradcheck(lambda *a: expert_mlp_reference(*a, offsets), (x, w13, w2))
    torch.testing.assert_close(expert_mlp(x, w13, w2, offsets), by_hand(x, w13, w2, sizes))
    assert torch.autograd.gradcheck(lambda *a: expert_mlp(*a, offsets), (x, w13, w2))


def both_ways(sizes: list[int], dtype: torch.dtype, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(ours, exact) of output and the three gradients."""
    x, w13, w2, offsets = problem(sizes, dtype, seed)
    grad = torch.randn(x.shape).to(dtype)
    out = expert_mlp(x, w13, w2, offsets)
    assert out.dtype == dtype
    exact = [y.detach().double().requires_grad_() for y in (x, w13, w2)]
    reference = expert_mlp_reference(*exact, offsets)
    ours = torch.autograd.grad(out, (x, w13, w2), grad)
    theirs = torch.autograd.grad(reference, exact, grad.double())
    return [(out, reference), *zip(ours, theirs, strict=True)]


PASSES = {"by expert": experts._BY_EXPERT, "grouped": experts._GROUPED}


@pytest.fixture(params=PASSES)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs, and as on GPUs."""
    monkeypatch.setattr(experts, "_passes", lambda x, fp8: PASSES[request.param])


group_sizes = st.lists(st.sampled_from([0, 0, 1, 3, 8, 32]), min_size=1, max_size=6).filter(any)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group_sizes, st.integers(0, 2**31))
def test_in_float32(passes: None, sizes: list[int], seed: int) -> None:
    for ours, exact in both_ways(sizes, torch.float32, seed):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(group_sizes, st.integers(0, 2**31))
def test_in_bf16(passes: None, sizes: list[int], seed: int) -> None:
    for ours, exact in both_ways(sizes, torch.bfloat16, seed):
        # Three roundings to 8 bits on the way; relative to the whole tensor, as single entries may cancel.
        error = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)
        assert error < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_expert_gets_zero_gradients(passes: None, dtype: torch.dtype) -> None:
    x, w13, w2, offsets = problem([0, 32, 0], dtype)
    expert_mlp(x, w13, w2, offsets).float().square().sum().backward()
    for weight in (w13, w2):
        assert weight.grad[1].abs().sum() > 0
        assert torch.equal(weight.grad[0], torch.zeros_like(weight.grad[0]))
        assert torch.equal(weight.grad[2], torch.zeros_like(weight.grad[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_rows_at_all(passes: None, dtype: torch.dtype) -> None:
    x, w13, w2, offsets = problem([0, 0], dtype)
    out = expert_mlp(x, w13, w2, offsets)
    assert out.shape == (0, D)
    out.sum().backward()
    assert torch.equal(w13.grad, torch.zeros_like(w13)) and torch.equal(w2.grad, torch.zeros_like(w2))


def test_odd_widths(passes: None) -> None:
    sizes = [3, 1]
    x, w13, w2, offsets = problem(sizes, torch.float32, d=5, f=3)
    out = expert_mlp(x, w13, w2, offsets)
    torch.testing.assert_close(out.double(), by_hand(x, w13, w2, sizes), rtol=1e-5, atol=1e-5)


def test_frozen_inputs() -> None:
    x, w13, w2, offsets = problem([4, 4], torch.float32)
    w13.requires_grad_(False)
    expert_mlp(x.detach(), w13, w2, offsets).sum().backward()
    assert w2.grad is not None and w13.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_columns_is_zero(passes: None, dtype: torch.dtype) -> None:
    # A rank of a column split may hold none of a narrow expert.
    x, w13, w2, offsets = problem([2, 0, 3], dtype, f=0)
    out = expert_mlp(x, w13, w2, offsets)
    assert torch.equal(out, torch.zeros_like(x))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and w13.grad.shape == w13.shape and w2.grad.shape == w2.shape


def flops(run: Callable[[], Any]) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_split_backward_computes_each_gradient_once(passes: None, monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    """By the functions with which torch's pipeline stages split it."""
    if fp8:
        monkeypatch.setattr(experts, "_passes", lambda x, fp8: experts._FP8)
    *leaves, offsets = problem([32, 0, 64], torch.float32)
    grad = torch.randn(leaves[0].shape)
    y, forward = flops(lambda: expert_mlp(*leaves, offsets))
    whole, both = flops(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    assert both == 2 * forward
    (_, groups), of_input = flops(lambda: stage_backward_input([y], [grad], leaves[:1], iter(leaves[1:])))
    assert of_input == forward and leaves[1].grad is None
    _, of_weights = flops(lambda: stage_backward_weight(iter(leaves[1:]), groups))
    assert of_weights == forward
    for leaf, wanted in zip(leaves, whole, strict=True):
        assert torch.equal(leaf.grad, wanted)


def test_halves_asked_for_with_other_gradients_do_not_mix(passes: None) -> None:
    *leaves, offsets = problem([3, 5], torch.float32)
    y = expert_mlp(*leaves, offsets)
    one, other = torch.randn(2, *y.shape)
    wanted = torch.autograd.grad(y, leaves, other, retain_graph=True)
    torch.autograd.grad(y, leaves[:1], one, retain_graph=True)
    for found, exact in zip(torch.autograd.grad(y, leaves[1:], other, retain_graph=True), wanted[1:], strict=True):
        assert torch.equal(found, exact)
    torch.autograd.grad(y, leaves[:1], one, retain_graph=True)
    one.copy_(other)  # the same tensor with other values
    for found, exact in zip(torch.autograd.grad(y, leaves, one, retain_graph=True), wanted, strict=True):
        assert torch.equal(found, exact)
    torch.autograd.grad(y, leaves[:1], one, retain_graph=True)
    one.zero_()
    assert all((found == 0).all() for found in torch.autograd.grad(y, leaves[1:], one))


def test_input_and_up_projection_are_what_is_kept(passes: None) -> None:
    x, w13, w2, offsets = problem([32, 64], torch.bfloat16)
    kept = dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(x, w13, w2, offsets)
    others = {tensor.data_ptr() for tensor in (w13, w2, offsets)}
    assert {tensor.shape for at, tensor in kept.items() if at not in others} == {(96, D), (96, 2 * F)}
    assert len(kept) == 5


def test_expanded_gradients(passes: None) -> None:
    x, w13, w2, offsets = problem([4, 4], torch.float32)
    expert_mlp(x, w13, w2, offsets).sum().backward()
    exact = [y.detach().double().requires_grad_() for y in (x, w13, w2)]
    expert_mlp_reference(*exact, offsets).sum().backward()
    for ours, theirs in zip((x, w13, w2), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
