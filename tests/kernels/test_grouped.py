from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moeforge.kernels.fp8 import to_e4m3
from moeforge.kernels.fp8_weight import BLOCK, Fp8Weight, dequantize, quantize_activations
from moeforge.kernels.grouped import grouped_input_grad, grouped_matmul, grouped_weight_grad

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = [[5, 0, 40, 3], [0, 0, 19], [70], [0, 0], []]


def assert_near(ours: Tensor, exact: Tensor, least: float = 0.0) -> None:
    assert ours.shape == exact.shape
    if ours.numel():
        limit = max(least, TOLERANCE[ours.dtype])
        assert (ours.double() - exact).abs().max() <= limit * exact.abs().max()


def multiplies_e4m3(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)


def offsets_of(sizes: list[int], device: str) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


@contextmanager
def no_synchronisation(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Where GPUs compute in float64, the reference does, which reads the offsets."""
    if device == "cpu" or dtype == torch.float64:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(24, 40), (7, 13)])
@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_are_those_of_autograd(
    sizes: list[int], widths: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    (n, k), rows = widths, sum(sizes)
    x, weight = torch.randn(rows, k).to(device, dtype), torch.randn(len(sizes), n, k).to(device, dtype)
    grad, offsets = torch.randn(rows, n).to(device, dtype), offsets_of(sizes, device)
    exact_x, exact_weight = (y.double().clone().requires_grad_() for y in (x, weight))
    expert = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device).long())
    exact = torch.einsum("rk,rnk->rn", exact_x, exact_weight[expert])
    exact.backward(grad.double())
    with no_synchronisation(device, dtype):
        ours = grouped_matmul(x, weight, offsets)
        input_grad, weight_grad = grouped_input_grad(grad, weight, offsets), grouped_weight_grad(grad, x, offsets)
    assert ours.dtype == input_grad.dtype == weight_grad.dtype == dtype
    assert_near(ours, exact.detach())
    for gradient, expected in ((input_grad, exact_x.grad), (weight_grad, exact_weight.grad)):
        assert expected is not None
        assert_near(gradient, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_expanded_inputs(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    offsets = offsets_of([16, 0, 32], device)
    x, weight = torch.randn(64, 48, device=device).to(dtype).t(), torch.randn(3, 64, 24, device=device).to(dtype)
    weight, dense = weight.transpose(1, 2), weight.transpose(1, 2).contiguous()
    assert_near(grouped_matmul(x, weight, offsets), grouped_matmul(x.contiguous(), dense, offsets).double())
    grad = torch.tensor(0.5, device=device, dtype=dtype).expand(48, 24)
    expected = grouped_input_grad(grad.contiguous(), dense, offsets).double()
    assert_near(grouped_input_grad(grad, weight, offsets), expected)
    expected = grouped_weight_grad(grad.contiguous(), x.contiguous(), offsets).double()
    assert_near(grouped_weight_grad(grad, x, offsets), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_weights(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    sizes, x = [4, 0, 17], torch.randn(21, 144).to(device, dtype)
    weight = Fp8Weight(to_e4m3(torch.randn(3, 32, 144)).to(device), torch.rand(3, 2, 2, device=device))
    wide, scale = dequantize(weight, torch.float64), torch.tensor(0.005, device=device)
    offsets = offsets_of(sizes, device)
    for activations in ("none", "dynamic", "static"):
        inputs = x.double()
        if activations != "none":
            values, scales = quantize_activations(x, scale if activations == "static" else None, 0)
            by_column = scales if activations == "static" else scales.repeat_interleave(BLOCK, 1)[:, :144]
            inputs = values.double() * by_column.double()
        exact = torch.cat([part @ w.T for part, w in zip(inputs.split(sizes), wide, strict=True)])
        with no_synchronisation(device, dtype):
            y = grouped_matmul(x, weight, offsets, activations, scale)
        assert y.dtype == dtype
        # Tensor cores add products of e4m3 with 14 bits.
        assert_near(y, exact, 2**-12 if activations != "none" and multiplies_e4m3(device) else 0.0)


@pytest.mark.cuda
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_bits_of_a_row_do_not_depend_on_its_batch_mates(activations: str) -> None:
    """Whatever configuration the number of rows chooses."""
    torch.manual_seed(0)
    x = torch.randn(2048, 256, device="cuda", dtype=torch.bfloat16)
    plain = torch.randn(4, 256, 256, device="cuda", dtype=torch.bfloat16)
    weight = Fp8Weight(to_e4m3(plain.float()), torch.rand(4, 16, 2, device="cuda"))
    for w, kind in ((plain, "none"), (weight, activations)):
        together = grouped_matmul(x, w, offsets_of([512] * 4, "cuda"), kind)
        for rows in (1, 17, 100, 300):
            alone = grouped_matmul(x[512 : 512 + rows], w, offsets_of([0, rows, 0, 0], "cuda"), kind)
            assert torch.equal(alone, together[512 : 512 + rows])
