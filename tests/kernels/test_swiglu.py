import pytest
import torch
import torch.nn.functional as F

from moeforge.kernels import swiglu, swiglu_invariant
from moeforge.kernels.swiglu import swiglu_backward, swiglu_forward


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4), (0, 8), (3, 0)])
def test_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gate, up = h.chunk(2, -1)
    torch.testing.assert_close(swiglu(h), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (h,))


def test_the_function_behind_it_is_the_same() -> None:
    torch.manual_seed(0)
    h = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 4, dtype=torch.float64)
    out = swiglu(h)
    assert torch.equal(out, swiglu_forward(h.detach()))
    assert torch.equal(torch.autograd.grad(out, h, grad)[0], swiglu_backward(h.detach(), grad)[1])


def test_saturated_gates_stay_finite() -> None:
    h = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], requires_grad=True)
    out = swiglu(h)
    out.sum().backward()
    torch.testing.assert_close(out, torch.tensor([[0.0, 3e4]]))
    torch.testing.assert_close(h.grad, torch.tensor([[0.0, 3.0, 0.0, 1e4]]))


@pytest.mark.parametrize("columns", [24, 48, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads(columns: int, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    h = torch.randn(2000, 2 * columns).to(dtype)
    try:
        torch.set_num_threads(3)
        together = swiglu_invariant(h)
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (5, 6), (1000, 1017), (1, 2000)):
        assert torch.equal(swiglu_invariant(h[begin:end]), together[begin:end])
