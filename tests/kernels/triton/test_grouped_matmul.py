from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.kernels.fp8_weight import BLOCK, Fp8Weight, dequantize, quantize_activations
from moeforge.kernels.grouped import grouped_matmul_reference
from moeforge.kernels.triton import fp8_convert
from moeforge.kernels.triton.configs import BLOCK_K, Config, Kind, default_config, parts
from moeforge.kernels.triton.grouped_matmul import (
    grouped_input_grad,
    grouped_matmul,
    matmul,
    matmul_kernel,
)
from moeforge.kernels.triton.swiglu import swiglu_forward
from moeforge.kernels.triton.weight_grad import grouped_weight_grad, weight_grad_kernel

from .compiling import ARCHITECTURES, cross_compile
from .conftest import DTYPES

grouped_matmul_module = importlib.import_module("moeforge.kernels.triton.grouped_matmul")

SMALL = Config(16, 32, 4, 2, group_m=2)
"""Small tiles, so that small problems have several of each kind."""
FEW, MANY = Config(16, 64, 4, 3), Config(64, 64, 4, 2)
"""Tiles of which sm_90 sums both in the same instructions."""
GROUPS = [[3, 0, 17, 1], [0, 0, 37], [21], [0, 5, 0, 0, 40, 0]]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def offsets_of(sizes: list[int], device: str) -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


def by_hand(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """x W^T of each expert's rows, in float64."""
    pairs = zip(x.double().split(sizes), weight.double(), strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in pairs])


def assert_near(ours: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
    """Relative to the largest element: single ones may be sums that cancel."""
    limit = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    assert (ours.double() - exact).abs().max() <= limit * exact.abs().max()


def fp8_weight(experts: int, n: int, k: int, kind: str, device: str) -> Fp8Weight:
    """Random values, every code but NaN among them, and random scales of a kind."""
    codes = torch.randint(0, 256, (experts, n, k), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 1
    rows = n if kind == "channel" else -(-n // 16)
    columns = -(-k // 128) if kind == "block" else 1
    scales = torch.rand(experts, rows, columns) + 0.1
    return Fp8Weight(codes.view(torch.float8_e4m3fn).to(device), scales.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", GROUPS)
def test_products_and_both_gradients(sizes: list[int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    n, k = 37, 45
    x, weight = torch.randn(sum(sizes), k).to(device, dtype), torch.randn(len(sizes), n, k).to(device, dtype)
    grad = torch.randn(sum(sizes), n).to(device, dtype)
    offsets = offsets_of(sizes, device)
    assert_near(grouped_matmul(x, weight, offsets, config=SMALL), by_hand(x, weight, sizes))
    exact = by_hand(grad, weight.transpose(1, 2), sizes)
    assert_near(grouped_input_grad(grad, weight, offsets, config=SMALL), exact)
    weight_grad = grouped_weight_grad(grad, x, offsets, config=SMALL)
    exact = torch.stack([g.T @ y for g, y in zip(grad.double().split(sizes), x.double().split(sizes), strict=True)])
    assert_near(weight_grad, exact)
    assert not weight_grad[torch.tensor(sizes) == 0].any()


def test_strided_and_expanded_inputs(device: str) -> None:
    torch.manual_seed(0)
    sizes = [9, 0, 12]
    offsets, weight = offsets_of(sizes, device), torch.randn(3, 20, 48, device=device)[:, :, 1::2]
    x = torch.randn(24, 42, device=device).t()[::2]
    assert_near(grouped_matmul(x, weight, offsets, config=SMALL), by_hand(x, weight, sizes))
    for grad in (torch.tensor(0.7, device=device).expand(21, 20), torch.randn(21, 1, device=device).expand(21, 20)):
        contiguous = grad.contiguous()
        expected = grouped_input_grad(contiguous, weight, offsets, config=SMALL)
        assert torch.equal(grouped_input_grad(grad, weight, offsets, config=SMALL), expected)
        expected = grouped_weight_grad(contiguous, x, offsets, config=SMALL)
        assert torch.equal(grouped_weight_grad(grad, x, offsets, config=SMALL), expected)


def test_nothing_in_any_dimension(device: str) -> None:
    offsets = offsets_of([0, 0], device)
    assert grouped_matmul(torch.ones(0, 8, device=device), torch.ones(2, 4, 8, device=device), offsets).shape == (0, 4)
    assert grouped_matmul(torch.ones(0, 8, device=device), torch.ones(2, 0, 8, device=device), offsets).shape == (0, 0)
    assert not grouped_weight_grad(torch.ones(0, 4, device=device), torch.ones(0, 8, device=device), offsets).any()
    some = offsets_of([1, 2], device)
    assert not grouped_matmul(torch.ones(3, 0, device=device), torch.ones(2, 4, 0, device=device), some).any()


def test_rows_past_the_last_offset_disturb_nothing(device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32, device=device), torch.randn(2, 16, 32, device=device)
    x[30:] = torch.nan
    offsets = offsets_of([13, 17], device)
    assert_near(grouped_matmul(x, weight, offsets, config=SMALL)[:30], by_hand(x[:30], weight, [13, 17]))
    grad = torch.randn(64, 16, device=device)
    assert grouped_weight_grad(grad, x, offsets, config=SMALL).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("native", [True, False])
def test_fp8_weights(native: bool, kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the type itself and through its bytes."""
    if device == "cuda" and native and not fp8_convert.native(torch.device(device)):
        pytest.skip("no e4m3 on this GPU")
    monkeypatch.setattr(fp8_convert, "native", lambda _: native)
    torch.manual_seed(0)
    sizes = [3, 0, 18]
    weight = fp8_weight(len(sizes), 40, 200, kind, device)
    x = torch.randn(21, 200).to(device, dtype)
    offsets = offsets_of(sizes, device)
    wide = dequantize(weight, torch.float64)
    assert_near(grouped_matmul(x, weight, offsets, config=SMALL), by_hand(x, wide, sizes))
    for activations, scale in (("dynamic", None), ("static", torch.tensor(0.006, device=device))):
        values, scales = quantize_activations(x, scale, weight.block_offset)
        if scales.numel() > 21:
            scales = scales.repeat_interleave(BLOCK, 1)[:, :200]
        exact = by_hand(values.double() * scales.double(), wide, sizes)
        assert_near(grouped_matmul(x, weight, offsets, activations, scale, config=SMALL), exact)


@pytest.mark.parametrize("cuts", [[0, 16, 176, 192, 336, 400], [0, 112, 240, 400]])
def test_shards_of_block_scaled_weights_sum_to_the_whole(cuts: list[int], device: str) -> None:
    torch.manual_seed(0)
    sizes, whole = [5, 11], fp8_weight(2, 48, 400, "block", device)
    x, offsets = torch.randn(16, 400, device=device), offsets_of(sizes, device)
    total = torch.zeros(16, 48, dtype=torch.float64, device=device)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        scales = whole.scales[:, :, begin // 128 : -(-end // 128)]
        shard = Fp8Weight(whole.values[:, :, begin:end], scales, begin % 128)
        part = grouped_matmul(x[:, begin:end], shard, offsets, config=SMALL)
        assert_near(part, by_hand(x[:, begin:end], dequantize(shard, torch.float64), sizes))
        rounded = grouped_matmul(x[:, begin:end], shard, offsets, "dynamic", config=SMALL)
        assert_near(rounded, grouped_matmul_reference(x[:, begin:end].double(), shard, offsets, "dynamic"))
        total += part
    assert_near(total.float(), by_hand(x, dequantize(whole, torch.float64), sizes), 1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_static_scale_is_one_number_of_any_shape(shape: tuple[int, ...], device: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 144, device=device), fp8_weight(1, 24, 144, "tensor", device)
    fixed = torch.full(shape, 0.01, device=device)
    exact = grouped_matmul_reference(x.double(), weight, offsets_of([3], device), "static", fixed)
    assert_near(grouped_matmul(x, weight, offsets_of([3], device), "static", fixed, config=SMALL), exact, 1e-3)


def test_nan_stays_in_its_row_and_column(device: str) -> None:
    torch.manual_seed(0)
    sizes, weight = [4, 6], fp8_weight(2, 24, 144, "block", device)
    weight.values.view(torch.uint8)[1, 5, 130] = 0xFF
    x = torch.randn(10, 144, device=device)
    x[2, 7] = torch.nan
    expected = torch.zeros(10, 24, dtype=torch.bool, device=device)
    expected[2] = True
    expected[4:, 5] = True
    for activations in ("none", "dynamic"):
        y = grouped_matmul(x, weight, offsets_of(sizes, device), activations, config=SMALL)
        assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_bits_of_a_row_do_not_depend_on_its_batch_mates(activations: str, device: str) -> None:
    """Nor on the tiles: those of few rows and those of many sum alike."""
    torch.manual_seed(0)
    sizes, weight = [40, 9], fp8_weight(2, 64, 272, "block", device)
    plain = torch.randn(2, 64, 272, device=device).half()
    x = torch.randn(49, 272, device=device).half()
    alone = offsets_of([0, 1], device)
    for rows, w in ((x, weight), (x.bfloat16(), weight), (x, plain)):
        kind = activations if isinstance(w, Fp8Weight) else "none"
        y = grouped_matmul(rows, w, offsets_of(sizes, device), kind, config=MANY)
        assert torch.equal(grouped_matmul(rows[44:45], w, alone, kind, config=FEW), y[44:45])


@pytest.mark.parametrize("activations", ["none", "dynamic", "static"])
def test_parts_made_apart_add_up_to_the_bits_of_one_program(
    activations: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a weight has few rows: of few tokens parts of the sum are programs of their own, of many they are not."""
    torch.manual_seed(0)
    monkeypatch.setattr(grouped_matmul_module, "_APART_ROWS", 5)
    sizes, weight = [3, 0, 19], fp8_weight(3, 48, 2176, "block", device)
    weight = Fp8Weight(weight.values[:, :, 16:], weight.scales, 16)
    assert parts(48, 2160) == 2
    # bfloat16 weight-only goes through float16: the interpreter's dot is right.
    dtype = torch.bfloat16 if activations == "none" else torch.float16
    x, fixed = (torch.randn(22, 2160) / 1000).to(device, dtype), torch.tensor(1e-5, device=device)
    for gated in (False, True):
        y = matmul(x, weight, offsets_of(sizes, device), activations, fixed, MANY, gated)
        exact = grouped_matmul_reference(x.double(), weight, offsets_of(sizes, device), activations, fixed)
        assert_near(y, gated_by_hand(exact) if gated else exact, 2 * TOLERANCE[dtype])
        few = matmul(x[:5], weight, offsets_of([3, 0, 2], device), activations, fixed, FEW, gated)
        assert torch.equal(few, y[:5])


def gated_by_hand(h: Tensor) -> Tensor:
    gate, up = h.double().chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "sizes"), [(37, [3, 0, 17, 1]), (48, [0, 5, 0, 0, 40, 0])])
def test_gated_products(width: int, sizes: list[int], dtype: torch.dtype, device: str) -> None:
    """Against float64; and with the bits of the two kernels that the one replaces."""
    torch.manual_seed(0)
    x, offsets = torch.randn(sum(sizes), 45).to(device, dtype), offsets_of(sizes, device)
    w13 = torch.randn(len(sizes), 2 * width, 45).to(device, dtype)
    y = matmul(x, w13, offsets, config=FEW, gated=True)
    assert_near(y, gated_by_hand(by_hand(x, w13, sizes)), 2 * TOLERANCE[dtype])
    assert torch.equal(y, swiglu_forward(grouped_matmul(x, w13, offsets, config=FEW)))
    assert torch.equal(y, matmul(x, w13, offsets, config=MANY, gated=True))


@pytest.mark.parametrize(("kind", "first"), [("tensor", 0), ("channel", 0), ("block", 48)])
def test_gated_products_of_fp8_weights(kind: str, first: int, device: str) -> None:
    """The same, of a shard that begins at the column `first`; of static activations, of which some saturate; and of a
    row alone."""
    torch.manual_seed(0)
    sizes, whole = [3, 0, 10], fp8_weight(3, 2 * 40, 176, kind, device)
    w13, offsets = Fp8Weight(whole.values[:, :, first:], whole.scales, first), offsets_of(sizes, device)
    x, fixed = torch.randn(13, 176 - first).to(device, torch.float16) / 100, torch.tensor(4e-5, device=device)
    assert (x.abs() > 448 * fixed).any()
    for activations, scale in (("none", None), ("dynamic", None), ("static", fixed)):
        y = matmul(x, w13, offsets, activations, scale, MANY, gated=True)
        exact = gated_by_hand(grouped_matmul_reference(x.double(), w13, offsets, activations, scale))
        assert_near(y, exact, 2 * TOLERANCE[torch.float16])
        assert torch.equal(y, swiglu_forward(grouped_matmul(x, w13, offsets, activations, scale, MANY)))
        alone = matmul(x[7:8], w13, offsets_of([0, 0, 1], device), activations, scale, FEW, gated=True)
        assert torch.equal(alone, y[7:8])


def test_nan_stays_in_its_row_and_column_of_gated_products(device: str) -> None:
    torch.manual_seed(0)
    w13, offsets = fp8_weight(2, 48, 144, "block", device), offsets_of([4, 6], device)
    w13.values.view(torch.uint8)[1, 5, 130] = 0xFF  # of the gate
    w13.values.view(torch.uint8)[1, 24 + 11, 0] = 0x7F  # of up
    x = torch.randn(10, 144, device=device)
    x[2, 7], x[5, 7] = torch.nan, torch.inf
    for activations in ("none", "dynamic"):
        y = matmul(x, w13, offsets, activations, config=SMALL, gated=True)
        apart = swiglu_forward(grouped_matmul(x, w13, offsets, activations, config=SMALL))
        assert torch.equal(y.isnan(), apart.isnan()) and torch.equal(y.nan_to_num(), apart.nan_to_num())
        assert y[2].isnan().all() and y[4:, [5, 11]].isnan().all()
        y[2], y[5], y[4:, [5, 11]] = 0, 0, 0
        assert y.isfinite().all()


STRIDES = (
    "x_row",
    "x_scale_column",
    "w_expert",
    "w_row",
    "w_scale_expert",
    "w_scale_row",
    "w_scale_column",
    "column_offset",
)


def compile_matmul(
    architecture: int,
    kind: Kind,
    rows: int,
    block_scales: bool = False,
    grouped: bool = True,
    transposed: bool = False,
    gated: bool = False,
    in_parts: int = 1,
    apart: bool = False,
) -> Any:
    """The default configuration of a bucket of rows, as a launch of contiguous tensors specialises it."""
    tile = default_config(kind, rows)
    x = "*fp32" if kind == "float32" else "*bf16"
    e4m3 = "*fp8e4nv" if architecture >= 89 else "*u8"
    types = dict.fromkeys(("rows", "N", "K", "x_scale_row", *STRIDES), "i32")
    fp8 = kind in ("weight-only", "w8a8") or block_scales
    types |= {"x": {"w8a8": e4m3, "weight-only": "*fp16"}.get(kind, x), "w": e4m3 if fp8 else x, "y": x}
    types |= {"w_scales": "*fp32"} if fp8 else {}
    types |= {"x_scales": "*fp32"} if kind in ("weight-only", "w8a8") else {}
    types |= {"offsets": "*i32"} if grouped else {}
    if transposed:
        types["w_column"] = types.pop("w_row")
    if apart:
        types["y"] = "*fp32"
    constants = dict.fromkeys({"offsets", "x_scales", "w_scales"} - types.keys())
    constants |= dict.fromkeys({"x_column", "w_row", "w_column"} - types.keys(), 1)
    constants |= {
        "EXPERTS": 16,
        "PADDED": 16,
        "GROUP_ROWS": 16,
        "BLOCK_SCALES": block_scales,
        "X_BLOCK_SCALES": block_scales and kind == "w8a8",
        "EIGHT_BITS": kind == "w8a8",
        "NATIVE": architecture >= 89 and kind == "w8a8",
        "GATED": gated,
        "PARTS": in_parts,
        "APART": apart,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": BLOCK_K[kind],
        "GROUP_M": tile.group_m,
    }
    return cross_compile(matmul_kernel, architecture, types, constants, tile.num_warps, tile.num_stages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_to_tensor_core_instructions(architecture: int) -> None:
    for fp8 in (False, True):
        assert "mma" not in compile_matmul(architecture, "float32", 64, fp8).asm["ptx"]  # it would round to TF32
    mma = "mma.sync.aligned.m16n8k{1}.row.col.f32.{2}"
    wide = "wgmma.mma_async.sync.aligned.m64n{}k{}.f32.{}" if architecture >= 90 else mma
    depth, operands = (32, "e4m3.e4m3") if architecture >= 89 else (16, "f16.f16")
    for compiled, instruction in (
        (compile_matmul(architecture, "16-bit", 16), wide.format(16, 16, "bf16.bf16")),
        (compile_matmul(architecture, "16-bit", 128, transposed=True), wide.format(128, 16, "bf16.bf16")),
        (compile_matmul(architecture, "weight-only", 128, grouped=False), wide.format(128, 16, "f16.f16")),
        (
            compile_matmul(architecture, "weight-only", 16, block_scales=True, gated=True),
            wide.format(16, 16, "f16.f16"),
        ),
        (compile_matmul(architecture, "w8a8", 64, block_scales=True, gated=True), wide.format(32, depth, operands)),
        (
            compile_matmul(architecture, "weight-only", 16, block_scales=True, gated=True, in_parts=4, apart=True),
            wide.format(16, 16, "f16.f16"),
        ),
        (compile_matmul(architecture, "w8a8", 128, block_scales=True, in_parts=4), wide.format(128, depth, operands)),
        (compile_matmul(architecture, "w8a8", 128, block_scales=True), wide.format(128, depth, operands)),
    ):
        assert instruction in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weight_gradient_compiles(dtype: str, architecture: int) -> None:
    tile = default_config("weight-grad", 128)
    types = {name: f"*{dtype}" for name in ("grad", "x", "out")} | {"offsets": "*i32"}
    types |= dict.fromkeys(("N", "K", "grad_row", "x_row"), "i32")
    constants = {"grad_column": 1, "x_column": 1, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants["BLOCK_R"] = BLOCK_K["float32" if dtype == "fp32" else "16-bit"]
    cross_compile(weight_grad_kernel, architecture, types, constants, tile.num_warps, tile.num_stages)
