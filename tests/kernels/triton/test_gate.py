from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.kernels import PreparedGate
from moeforge.kernels import gate as public
from moeforge.kernels.gate import Gate
from moeforge.kernels.triton import gate
from moeforge.kernels.triton.router import STAGES, step
from moeforge.kernels.triton.rows import tile

from .compiling import ARCHITECTURES, cross_compile
from .conftest import DTYPES


def weighted(chosen: Gate, grads: list[Tensor | None]) -> Tensor:
    """A number whose gradient for each output is the one given."""
    return sum((y * g).sum() for y, g in zip(chosen, grads, strict=False) if g is not None)


@pytest.mark.parametrize("scale", [None, 0.5, torch.tensor(0.7)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("tokens, experts, k", [(5, 3, 1), (40, 16, 2), (7, 60, 8), (3, 5, 5), (0, 4, 3)])
def test_agrees_with_float64(
    tokens: int, experts: int, k: int, renormalize: bool, scale: float | Tensor | None, device: str
) -> None:
    torch.manual_seed(0)
    leaves = [(3 * torch.randn(tokens, experts)).to(device).requires_grad_()]
    if isinstance(scale, Tensor):
        leaves.append(scale.to(device).requires_grad_())
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = public(leaves[0], k, leaves[-1] if isinstance(scale, Tensor) else scale, renormalize)
    theirs = public(exact_leaves[0], k, exact_leaves[-1] if isinstance(scale, Tensor) else scale, renormalize)
    assert ours.experts.dtype == torch.int64 and torch.equal(ours.experts, theirs.experts)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    full = [torch.randn(y.shape).to(device) for y in ours[:3]]
    for grads in (full, [full[0], None, None], [None, full[1], None], [None, None, full[2]]):
        found = torch.autograd.grad(weighted(ours, grads), leaves, retain_graph=True, materialize_grads=True)
        expected = torch.autograd.grad(weighted(theirs, grads), exact_leaves, retain_graph=True, materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_strided_logits_and_an_expanded_gradient(device: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(12, 20, device=device)
    for raw in (wide[::3, 4:10], wide.t()[:12]):
        leaf, exact = raw.detach().requires_grad_(), raw.double().requires_grad_()
        (ours,) = torch.autograd.grad(public(leaf, 2, 1.0, False).weights.sum(), leaf)
        (theirs,) = torch.autograd.grad(public(exact, 2, 1.0, False).weights.sum(), exact)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("experts", [4, 7, 16])
def test_ties_go_to_the_lower_expert(experts: int, device: str) -> None:
    torch.manual_seed(0)
    raw = torch.randint(3, (50, experts)).float()
    raw[0] = 0
    raw[1] = torch.where(raw[1] == 0, -0.0, raw[1])
    raw[2, 1:] = -torch.inf
    for k in range(1, min(experts, 8) + 1):
        expected = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:k] for row in raw.tolist()]
        assert public(raw.to(device), k, None, True).experts.tolist() == expected


def test_equal_logits_give_a_uniform_gate_and_finite_gradients(device: str) -> None:
    raw = torch.full((3, 5), 3.7, device=device, requires_grad=True)
    scale = torch.tensor(1.0, device=device, requires_grad=True)
    chosen = public(raw, 2, scale, True)
    torch.testing.assert_close(chosen.probabilities, torch.full_like(raw, 0.2))
    assert chosen.experts.tolist() == [[0, 1]] * 3
    (chosen.weights[:, 0].sum() + chosen.probabilities.square().sum()).backward()
    assert torch.isfinite(raw.grad).all() and torch.isfinite(scale.grad)


def test_a_spoilt_row_still_names_different_experts_and_spoils_no_other(device: str) -> None:
    torch.manual_seed(0)
    raw = torch.randn(4, 6, device=device)
    whole = public(raw, 3, None, True)
    raw[1] = torch.nan
    raw[2, 4] = torch.nan
    chosen = public(raw, 3, None, True)
    assert chosen.weights[1:3].isnan().all() and chosen.experts[2, 0] == 4
    assert all(len(set(row)) == 3 and max(row) < 6 for row in chosen.experts.tolist())
    for a, b in zip(chosen, whole, strict=True):
        assert torch.equal(a[[0, 3]], b[[0, 3]])


def test_a_row_has_the_same_bits_in_any_company(device: str) -> None:
    torch.manual_seed(0)
    raw = torch.randn(300, 16, device=device)
    together = public(raw, 2, 1.0, True)
    for begin, end in ((0, 1), (77, 78), (3, 110)):
        for a, b in zip(public(raw[begin:end], 2, 1.0, True), together, strict=True):
            assert torch.equal(a, b[begin:end])


def router(weight: Tensor, k: int, bias: Tensor | None = None, **options: Any) -> PreparedGate:
    made = PreparedGate(weight, bias, k, **({"scale": 1.0, "renormalize": True} | options), dtype=weight.dtype)
    assert made._fused is not None
    return made


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "tokens, experts, columns, k, scale, renormalize",
    [(70, 8, 100, 2, None, True), (5, 60, 264, 8, 0.5, False), (0, 16, 64, 2, 1.0, True), (33, 256, 40, 4, 1.0, True)],
)
def test_routing_agrees_with_float64(
    tokens: int, experts: int, columns: int, k: int, scale: float | None, renormalize: bool, bias: bool,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, columns).to(device, dtype), torch.randn(experts, columns).to(device, dtype) / 8
    shift = torch.randn(experts).to(device, dtype) if bias else None
    weights, chosen = router(weight, k, shift, scale=scale, renormalize=renormalize)(x)
    raw = x.double() @ weight.double().t() + (0 if shift is None else shift.double())
    exact = public(raw, k, scale, renormalize)
    assert weights.dtype == torch.float32 and chosen.dtype == torch.int64 and torch.equal(chosen, exact.experts)
    torch.testing.assert_close(weights.double(), exact.weights, rtol=1e-4, atol=1e-6)


def test_routing_of_strided_tied_and_spoilt_rows(device: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 48, device=device).half()
    weight[4] = weight[1]
    x = torch.randn(40, 60, device=device).half()[::2, 5:53]
    weights, chosen = router(weight, 6)(x)
    assert torch.equal(chosen, public(x.double() @ weight.double().t(), 6, 1.0, True).experts)
    x[3, 7] = torch.nan
    spoilt = router(weight, 6)(x)
    assert spoilt[0][3].isnan().all() and sorted(spoilt[1][3].tolist()) == list(range(6))
    others = torch.arange(20, device=device) != 3
    assert torch.equal(spoilt[0][others], weights[others]) and torch.equal(spoilt[1][others], chosen[others])


def test_routing_has_the_same_bits_in_any_company(device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, 300, device=device).half(), torch.randn(16, 300, device=device).half()
    together = router(weight, 2)(x)
    for begin, end in ((0, 1), (77, 78), (3, 90)):
        for a, b in zip(router(weight, 2)(x[begin:end]), together, strict=True):
            assert torch.equal(a, b[begin:end])


@pytest.mark.parametrize(
    "experts, columns, dtype", [(257, 8, torch.float16), (128, 4097, torch.float16), (8, 8, torch.float32)]
)
def test_other_routers_have_a_matmul_of_their_own(experts: int, columns: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, columns).to(device, dtype), torch.randn(experts, columns).to(device, dtype)
    made = PreparedGate(weight, None, 2, None, True, dtype)
    assert made._fused is None and torch.equal(
        made(x)[1], public(x.double() @ weight.double().t(), 2, None, True).experts
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("experts", [16, 64, 256])
def test_routing_compiles_to_tensor_core_instructions(experts: int, architecture: int) -> None:
    types = {"x_ptr": "*bf16", "router_ptr": "*bf16", "weight_ptr": "*fp32", "expert_ptr": "*i64"}
    types |= {"tokens": "i32", "columns": "i32", "stride": "i32", "scale": "fp32", "least_variance": "fp32"}
    constants = {"bias_ptr": None, "E": experts, "K": 2, "NORMALIZE": True, "RENORMALIZE": True, "TOKENS": gate._TOKENS}
    constants |= {"EXPERTS": experts, "CHOICES": 2, "COLUMNS": step(gate._TOKENS, experts)}
    constants["GROUPS"] = gate._groups(experts)
    compiled = cross_compile(gate._route, architecture, types, constants, gate._WARPS, STAGES)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "normalize, learned, renormalize", [(True, False, True), (True, True, False), (False, False, True)]
)
def test_compiles(normalize: bool, learned: bool, renormalize: bool, architecture: int) -> None:
    size = tile(16, gate._ELEMENTS)
    types = {"raw_ptr": "*fp32", "expert_ptr": "*i64", "tokens": "i32", "stride": "i32", "least_variance": "fp32"}
    constants = {"E": 16, "K": 2, "NORMALIZE": normalize, "RENORMALIZE": renormalize}
    constants |= {"TOKENS": size.rows, "EXPERTS": size.columns}
    (types if learned else constants)["scale_ptr"] = "*fp32" if learned else None
    (constants if learned or not normalize else types)["scale"] = None if learned or not normalize else "fp32"
    outputs = dict.fromkeys(("probability_ptr", "z_ptr", "weight_ptr"), "*fp32")
    cross_compile(gate._forward, architecture, types | outputs, constants | {"CHOICES": 2}, size.warps)
    grads = dict.fromkeys(("probability_grad_ptr", "weight_grad_ptr", "grad_ptr"), "*fp32")
    constants["z_grad_ptr"] = None
    (grads if learned else constants)["scale_grad_ptr"] = "*fp32" if learned else None
    cross_compile(gate._backward, architecture, types | grads, constants, size.warps)
