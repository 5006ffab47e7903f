from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

from moeforge.kernels import linear_cross_entropy

module = importlib.import_module("moeforge.kernels.cross_entropy")


def problem(tokens: int, dtype: torch.dtype, seed: int = 0, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(11, (tokens,), generator=generator)
    dropped = torch.rand(tokens, generator=generator) < ignored
    return x, weight, targets.masked_fill(dropped, -100)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([1, 2, 3, 4, 1024]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.4, 1.0]),
)
def test_equals_torch_at_every_chunk_boundary(tokens: int, chunk: int, seed: int, ignored: float) -> None:
    x, weight, targets = problem(tokens, torch.float64, seed, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        loss = linear_cross_entropy(x, weight, targets)
        (0.37 * loss).backward()
    ours = loss, x.grad.clone(), weight.grad if weight.grad is not None else torch.zeros_like(weight)
    x.grad = weight.grad = None
    expected = F.cross_entropy(x @ weight.t(), targets, ignore_index=-100, reduction="sum")
    (0.37 * expected).backward()
    for a, b in zip(ours, (expected, x.grad, weight.grad), strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_finite_differences() -> None:
    x, weight, targets = problem(5, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets), (x, weight))


def test_another_ignored_target() -> None:
    x, weight, _ = problem(4, torch.float64)
    targets = torch.tensor([3, 0, 3, 1])
    expected = F.cross_entropy(x @ weight.t(), targets, ignore_index=3, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, weight, targets, ignore=3), expected)


def test_large_logits_do_not_overflow() -> None:
    x = torch.tensor([[1e4, 0.0]], requires_grad=True)
    weight = torch.eye(2).requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -1.0]]))


def test_bf16_gives_a_float32_loss_near_the_exact_one() -> None:
    torch.manual_seed(0)
    x, weight = (
        torch.randn(64, 32).bfloat16().requires_grad_(),
        torch.randn(100, 32).bfloat16().requires_grad_(),
    )
    targets = torch.randint(100, (64,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 16)
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    exact = [y.detach().double().requires_grad_() for y in (x, weight)]
    reference = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")
    assert loss.item() == pytest.approx(reference.item(), rel=5e-3)
    ours = torch.autograd.grad(loss, (x, weight))
    theirs = torch.autograd.grad(reference, exact)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 2e-2


def test_bf16_gradients_are_scaled_without_a_systematic_error() -> None:
    """The scale 1 / tokens is not rounded to 8 bits: that would turn every gradient by the same factor."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(64, 32).bfloat16().requires_grad_(),
        torch.randn(100, 32).bfloat16().requires_grad_(),
    )
    targets = torch.randint(100, (64,))
    scale = 1.0 / 1013  # 0.3 % from the nearest bf16 number
    one = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    scaled = torch.autograd.grad(linear_cross_entropy(x, weight, targets) * scale, (x, weight))
    for a, b in zip(scaled, one, strict=True):
        ratio = (a.double() * b.double()).sum() / b.double().square().sum()
        assert ratio.item() == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [11, 64, 65])
def test_rows_of_logits_are_aligned_and_one_buffer_serves_all_chunks(
    columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, 6).to(dtype).requires_grad_() for rows in (10, columns))
    targets = torch.randint(columns, (10,))
    seen, inner = [], module._softmax_minus_target

    def recorded(logits: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert torch.equal(logits, x[4 * len(seen) :][:4] @ weight.t())
        seen.append((logits.data_ptr(), logits.shape, logits.stride()))
        return inner(logits, *rest, **options)

    monkeypatch.setattr(module, "_softmax_minus_target", recorded)
    linear_cross_entropy(x, weight, targets).backward()
    assert [shape for _, shape, _ in seen] == [(4, columns), (4, columns), (2, columns)]
    assert len({pointer for pointer, _, _ in seen}) == 1
    assert {stride for _, _, stride in seen} == {(128 if columns > 64 else 64, 1)}


@pytest.mark.cuda
def test_an_odd_vocabulary_on_a_gpu() -> None:
    """Its last columns are multiplied apart."""
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 64, device="cuda"), torch.randn(1003, 64, device="cuda") / 8
    targets = torch.randint(1003, (5000,), device="cuda")
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        ours = [t.to(dtype).requires_grad_() for t in (x, weight)]
        loss = linear_cross_entropy(*ours, targets)
        for found, grad in zip(
            torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact, retain_graph=True), strict=True
        ):
            assert (found.double() - grad).norm() <= tolerance * grad.norm()
        assert abs(float(loss) / float(expected) - 1) <= tolerance


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = problem(4, torch.float64)
    expected = linear_cross_entropy(x, weight, targets)

    products, mm = [], torch.mm

    def counted(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        products.append(out.shape)
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert products == [(4, 11)]  # the logits


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_side_frozen(frozen: str) -> None:
    x, weight, targets = problem(7, torch.float64)
    live, held = (weight, x) if frozen == "x" else (x, weight)
    held.requires_grad_(False)
    linear_cross_entropy(x, weight, targets).backward()
    expected = F.cross_entropy(x @ weight.t(), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(live.grad, torch.autograd.grad(expected, live)[0])
    assert held.grad is None


class Products(TorchDispatchMode):
    """Shapes of the matrices that were multiplied by something."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mul and args[0].dim() == 2:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_a_split_backward_scales_one_gradient_at_a_time() -> None:
    """By the functions with which torch's pipeline stages split it."""
    x, weight, targets = problem(7, torch.float64)
    loss = torch.stack([linear_cross_entropy(x, weight, targets) * 0.37])
    wanted = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    with Products() as of_input:
        _, groups = stage_backward_input([loss], None, [x], iter([weight]))
    with Products() as of_weight:
        stage_backward_weight(iter([weight]), groups)
    assert (of_input.shapes, of_weight.shapes) == ([x.shape], [weight.shape])
    assert torch.equal(x.grad, wanted[0]) and torch.equal(weight.grad, wanted[1])
