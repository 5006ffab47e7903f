from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels.fp8_weight import (
    BLOCK,
    GROUP_ROWS,
    Activations,
    Fp8Weight,
    dequantize,
    fp8_expert_mlp_reference,
    fp8_linear_reference,
    quantize_activations,
)


def random_weight(*shape: int, kind: str = "block128", offset: int = 0) -> Fp8Weight:
    """Random values, and random scales of the kind."""
    *stack, rows, columns = shape
    n = rows if kind == "channel" else -(-rows // GROUP_ROWS)
    k = -(-(offset + columns) // BLOCK) if kind == "block128" else 1
    values = (torch.randn(shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Fp8Weight(values, torch.rand(*stack, n, k) + 0.5, offset if kind == "block128" else 0)


def by_hand(weight: Fp8Weight) -> Tensor:
    """Element by element, as the contract says it."""
    out = torch.empty(weight.values.shape)
    *_, rows, columns = out.shape
    n, k = weight.scales.shape[-2:]
    g = 1 if n == rows else 16
    for r in range(rows):
        for c in range(columns):
            s = weight.scales[..., r // g, 0 if k == 1 else (c + weight.column_offset) // 128]
            out[..., r, c] = weight.values[..., r, c].float() * s
    return out


@pytest.mark.parametrize(
    ("shape", "kind", "offset"),
    [
        ((40, 20), "tensor", 0),
        ((40, 20), "channel", 0),
        ((33, 300), "block128", 0),
        ((33, 300), "block128", 112),
        ((16, 16), "block128", 64),
        ((2, 17, 140), "block128", 16),
        ((2, 17, 140), "channel", 0),
        ((1, 5), "tensor", 0),
        ((32, 0), "block128", 0),
        ((0, 32), "tensor", 0),
    ],
)
def test_dequantized_element_by_element(shape: tuple[int, ...], kind: str, offset: int) -> None:
    weight = random_weight(*shape, kind=kind, offset=offset)
    assert torch.equal(dequantize(weight, torch.float32), by_hand(weight))
    assert torch.equal(dequantize(weight, torch.bfloat16), by_hand(weight).bfloat16())


def test_activations_have_a_scale_a_row_that_knows_no_other_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 40) * torch.tensor([[1.0], [1e-3], [0.0], [1e5], [1e-42]])
    values, scale = quantize_activations(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    assert scale[2] == scale[4] == 1 and not values[2].float().any()
    torch.testing.assert_close(scale[[0, 1, 3]] * 448, x[[0, 1, 3]].abs().amax(1, keepdim=True))
    # Half a step of 3 bits of fraction, relative; below the normal range, half of the smallest step.
    error = (values.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10))[:4].all()
    for row in range(5):
        alone = quantize_activations(x[row : row + 1])
        assert torch.equal(alone[0].float(), values[row : row + 1].float()) and alone[1] == scale[row]


@pytest.mark.parametrize("offset", [0, 48])
def test_activations_have_a_scale_a_block_of_a_row_where_weights_have(offset: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 300) * torch.logspace(-3, 3, 300)
    values, scale = quantize_activations(x, None, offset)
    borders = [0, 128 - offset, 256 - offset, 300]
    assert scale.shape == (4, 3)
    for block, (begin, end) in enumerate(zip(borders, borders[1:], strict=False)):
        alone, scales = quantize_activations(x[:, begin:end])
        assert torch.equal(scales[:, 0], scale[:, block])
        assert torch.equal(alone.float(), values[:, begin:end].float())


def test_a_fixed_scale_saturates_and_what_is_not_finite_stays_visible() -> None:
    values, scale = quantize_activations(torch.tensor([[1.0, -1e9, 896.0, torch.nan]]), torch.tensor(2.0))
    assert scale == 2
    assert values.float()[0, :3].tolist() == [0.5, -448, 448] and values.float()[0, 3].isnan()
    dynamic, _ = quantize_activations(torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [1.0, 2.0]]))
    assert dynamic.float().isnan().any(1).tolist() == [True, True, False]
    no_columns, ones = quantize_activations(torch.empty(3, 0))
    assert no_columns.shape == (3, 0) and ones.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_linear_is_the_dequantised_product(activations: Activations) -> None:
    torch.manual_seed(0)
    weight, x, fixed = random_weight(48, 200, offset=16), torch.randn(7, 200, dtype=torch.float64), torch.tensor(0.01)
    seen = x
    if activations != "none":
        values, scale = quantize_activations(x, fixed if activations == "static" else None, 16)
        by_column = scale.double().repeat_interleave(BLOCK, 1)[:, 16:216] if activations == "dynamic" else scale
        seen = values.double() * by_column
        assert 0 < (seen - x).abs().max() < 0.3
    expected = seen @ by_hand(weight).double().T
    torch.testing.assert_close(fp8_linear_reference(x, weight, activations, fixed), expected)
    if activations == "none":
        low = fp8_linear_reference(x.bfloat16(), weight)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low, (x.bfloat16().double() @ by_hand(weight).double().T).bfloat16())


def test_shards_of_columns_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    whole, x = random_weight(32, 400), torch.randn(3, 400, dtype=torch.float64)
    parts = []
    for begin, end in ((0, 176), (176, 240), (240, 400)):
        scales = whole.scales[:, begin // BLOCK : -(-end // BLOCK)].contiguous()
        parts.append(
            fp8_linear_reference(x[:, begin:end], Fp8Weight(whole.values[:, begin:end], scales, begin % BLOCK))
        )
    torch.testing.assert_close(sum(parts), fp8_linear_reference(x, whole))


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 0, 0]])
@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_experts_row_by_row(sizes: list[int], activations: Activations) -> None:
    torch.manual_seed(0)
    d, f = 48, 144
    x = torch.randn(sum(sizes), d, dtype=torch.float64)
    w13, w2 = random_weight(3, 2 * f, d), random_weight(3, d, f, kind="channel")
    scales = (torch.tensor(0.02), torch.tensor(500.0))
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    out = fp8_expert_mlp_reference(x, w13, w2, offsets, activations, scales)
    experts = [e for e, size in enumerate(sizes) for _ in range(size)]
    assert out.shape == x.shape
    for row, e in enumerate(experts):
        gate, up = fp8_linear_reference(x[row : row + 1], w13.unbind()[e], activations, scales[0]).chunk(2, -1)
        h = gate * torch.sigmoid(gate) * up
        torch.testing.assert_close(out[row : row + 1], fp8_linear_reference(h, w2.unbind()[e], activations, scales[1]))


def test_no_experts_take_no_rows() -> None:
    weights = random_weight(0, 32, 16), random_weight(0, 16, 16)
    assert fp8_expert_mlp_reference(torch.empty(0, 16), *weights, torch.empty(0, dtype=torch.int32)).shape == (0, 16)
