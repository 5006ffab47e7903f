from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels import router_logits
from moeforge.kernels.triton import router

from .compiling import ARCHITECTURES, cross_compile
from .conftest import DTYPES, INTERPRETED

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 3, 40), (37, 16, 300), (70, 160, 129), (40, 40, 8), (5, 1, 264)]


def leaves(tokens: int, experts: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, weight and bias."""
    torch.manual_seed(0)
    shapes = (tokens, columns), (experts, columns), (experts,)
    return tuple(torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes)


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    """Equal to the float64 one but for its rounding to 16 bits, and nearly everywhere to the nearest.

    Gradients of logits rounded to 16 bits beforehand would not pass. The interpreter's stores cut bfloat16 off.
    """
    exact, tolerance = exact.detach(), torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=1e-5 * float(exact.abs().max()) + 1e-7)
    assert (INTERPRETED and ours.dtype == torch.bfloat16) or (ours == exact.to(ours.dtype)).double().mean() > 0.95


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens, experts, columns", SHAPES)
def test_agrees_with_float64_through_autograd(
    tokens: int, experts: int, columns: int, bias: bool, dtype: torch.dtype, device: str
) -> None:
    inputs = leaves(tokens, experts, columns, dtype, device)[: 3 if bias else 2]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours, exact = router_logits(*inputs), router_logits(*exact_inputs)
    assert ours.dtype == torch.float32 and type(ours.grad_fn).__name__ == "_RouterLogitsBackward"
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * columns**0.5)
    grad = torch.randn(exact.shape).to(device)
    found, expected = torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(exact, exact_inputs, grad.double())
    for x, a, b in zip(inputs, found, expected, strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_rounded(a, b)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens, experts, columns", SHAPES)
def test_gradients_of_either_type_and_any_size(
    tokens: int, experts: int, columns: int, dtype: torch.dtype, device: str
) -> None:
    x, weight, _ = (leaf.detach() for leaf in leaves(tokens, experts, columns, dtype, device))
    for size in (1.0, 1e-4, 1e-9 if dtype == torch.bfloat16 else 1e-3):
        grad = size * torch.randn(tokens, experts, device=device)
        assert_rounded(router.router_logits_grad_x(grad, weight), grad.double() @ weight.double())
        assert_rounded(router.router_logits_grad_weight(grad, x), grad.double().t() @ x.double())


def test_strided_inputs_and_gradients(device: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(74, 60, device=device).half()[::2, 5:53].requires_grad_()
    weight = torch.randn(48, 6, device=device).half().t().requires_grad_()
    logits = router_logits(x, weight)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)
    one, row = torch.ones((), device=device), torch.randn(6, device=device)
    for grad in (one.expand(37, 6), row.expand(37, 6), torch.randn(6, 37, device=device).t(), row[:1].expand(37, 6)):
        found = torch.autograd.grad(logits, (x, weight), grad, retain_graph=True)
        assert_rounded(found[0], grad.double() @ weight.double())
        assert_rounded(found[1], grad.double().t() @ x.double())


def test_no_tokens(device: str) -> None:
    inputs = leaves(0, 5, 24, torch.float16, device)
    logits = router_logits(*inputs)
    logits.sum().backward()
    assert logits.shape == (0, 5) and inputs[0].grad.shape == (0, 24)
    assert not inputs[1].grad.any() and not inputs[2].grad.any()


def test_rows_of_zeros_give_the_bias_and_zero_gradients(device: str) -> None:
    x, weight, bias = leaves(6, 5, 24, torch.float16, device)
    with torch.no_grad():
        x[2] = 0
    logits = router_logits(x, weight, bias)
    assert torch.equal(logits[2], bias.float())
    grad = torch.randn(6, 5, device=device)
    grad[4] = 0
    of_x, of_weight = torch.autograd.grad(logits, (x, weight), grad)
    assert not of_x[4].any() and of_x[2].any()
    kept = torch.tensor([0, 1, 3, 5], device=device)
    assert_rounded(of_weight, grad[kept].double().t() @ x[kept].double())


def test_only_the_gradients_asked_for(device: str) -> None:
    for wanted in range(3):
        inputs = [leaf.detach() for leaf in leaves(4, 5, 24, torch.float16, device)]
        inputs[wanted].requires_grad_()
        router_logits(*inputs).sum().backward()
        assert [leaf.grad is not None for leaf in inputs] == [i == wanted for i in range(3)]


def test_a_spoilt_row_spoils_no_other(device: str) -> None:
    x, weight, _ = (leaf.detach() for leaf in leaves(40, 5, 24, torch.float16, device))
    whole = router_logits(x, weight)
    x[3, 7] = torch.nan
    logits = router_logits(x, weight)
    others = torch.arange(40, device=device) != 3
    assert logits[3].isnan().all() and torch.equal(logits[others], whole[others])


def test_a_row_has_the_same_bits_in_any_company_and_gradients_when_repeated(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_PARTS", 2)  # so that one has several turns
    x, weight, bias = (leaf.detach() for leaf in leaves(200, 16, 300, torch.float16, device))
    grad = torch.randn(200, 16, device=device)
    together = router_logits(x, weight, bias), router.router_logits_grad_x(grad, weight)
    for begin, end in ((0, 1), (77, 78), (3, 110)):
        assert torch.equal(router_logits(x[begin:end], weight, bias), together[0][begin:end])
        assert torch.equal(router.router_logits_grad_x(grad[begin:end], weight), together[1][begin:end])
    first, second = (router.router_logits_grad_weight(grad, x) for _ in range(2))
    assert torch.equal(first, second)
    assert_rounded(first, grad.double().t() @ x.double())


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_other_types_are_multiplied_by_torch(types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    x, weight = torch.randn(4, 24).to(device, types[0]), torch.randn(5, 24).to(device, types[1]).requires_grad_()
    logits = router_logits(x, weight)
    assert torch.equal(logits, torch.nn.functional.linear(x.float(), weight))
    assert type(logits.grad_fn).__name__ != "_RouterLogitsBackward"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("experts", "bias"), [(16, True), (128, False)])
def test_compiles_to_tensor_core_instructions(experts: int, bias: bool, architecture: int) -> None:
    sizes = {"tokens": "i32", "columns": "i32", "stride": "i32"}
    size, width = router.forward_tile(experts)
    types = sizes | {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*fp32"}
    tile = {"E": experts, "TOKENS": size, "EXPERTS": width, "COLUMNS": router.step(size, width)}
    (types if bias else tile)["bias_ptr"] = "*bf16" if bias else None
    forward = cross_compile(router._forward, architecture, types, tile, num_stages=router.STAGES)
    tile = {"E": experts} | dict(zip(("TOKENS", "EXPERTS", "COLUMNS"), router._GRAD_X, strict=True))
    types = sizes | {"grad_ptr": "*fp32", "weight_ptr": "*bf16", "out_ptr": "*bf16"}
    of_x = cross_compile(router._backward_x, architecture, types, tile)
    tile |= dict(zip(("TOKENS", "EXPERTS", "COLUMNS"), router.grad_weight_tile(experts), strict=True))
    types = sizes | {"grad_ptr": "*fp32", "x_ptr": "*bf16", "partial_ptr": "*fp32"}
    types |= {"tokens_each": "i32", "grad_stride": "i32"}
    of_weight = cross_compile(router._backward_weight, architecture, types, tile, num_stages=router.STAGES)
    for compiled, kind in ((forward, ".f32.bf16.bf16"), (of_x, ".f32.tf32.tf32"), (of_weight, ".f32.tf32.tf32")):
        assert "mma" in compiled.asm["ptx"] and kind in compiled.asm["ptx"]
