"""Grouped matmuls on a GPU against what it gives: of training in bf16, of decoding in FP8.

FLOPs are those of real rows: filling an expert's rows up to whole groups counts nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.bench.gpu_layer import ROUNDS, Layer, ceilings, random, routing
from moeforge.bench.kernels_timing import in_turn, ratio, that_run
from moeforge.kernels import expert_mlp, expert_permutation, row_alignment
from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8_experts import fp8_expert_mlp
from moeforge.kernels.fp8_weight import BLOCK, GROUP_ROWS, Fp8Weight
from moeforge.kernels.grouped import grouped_input_grad, grouped_matmul, grouped_weight_grad

ROWS = (1, 8, 32, 64, 96)
"""Sequences of a decode step."""


def grouped(layer: Layer, device: torch.device, beside_triton: bool = False) -> dict[str, Any]:
    """Forward product, input gradient and weight gradient of both matmuls: TFLOP/s, and as a share of the dense ones.

    Beside them torch's grouped matmul, and our Triton kernels where asked (they take long to compile); ours is one of
    the two.
    """
    alignment = row_alignment(torch.bfloat16)
    sorted_rows = expert_permutation(routing(layer, layer.tokens, device)[1], layer.experts, alignment=alignment)
    ceiling = ceilings(device)["matmul_tflops"]
    result: dict[str, Any] = {"ceiling_tflops": ceiling}
    for name, n, k in (("up", 2 * layer.ffn, layer.hidden), ("down", layer.hidden, layer.ffn)):
        x, grad = (random(device, sorted_rows.source_R.numel(), width) for width in (k, n))
        weight, tera = random(device, layer.experts, n, k), 2e-12 * layer.tokens * layer.top_k * n * k
        for product, sides in _products(x, grad, weight, sorted_rows.offsets_E, beside_triton).items():
            able, failed = that_run(sides, "moeforge")
            found = in_turn(able, ROUNDS, device)
            rates = {side: tera / statistics.median(seconds) for side, seconds in found.items()}
            share = rates["moeforge"] / ceiling
            result[f"{name} {product}"] = {"tflops": rates, "share_of_ceiling": share, "failed": failed}
    return result


def _products(
    x: Tensor, grad: Tensor, weight: Tensor, offsets: Tensor, beside_triton: bool
) -> dict[str, dict[str, Callable[[], object]]]:
    sides: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {
            "moeforge": lambda: grouped_matmul(x, weight, offsets),
            "grouped_mm": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=offsets),
        },
        "input_grad": {
            "moeforge": lambda: grouped_input_grad(grad, weight, offsets),
            "grouped_mm": lambda: F.grouped_mm(grad, weight, offs=offsets),
        },
        "weight_grad": {
            "moeforge": lambda: grouped_weight_grad(grad, x, offsets),
            "grouped_mm": lambda: F.grouped_mm(grad.t(), x, offs=offsets),
        },
    }
    if beside_triton and use_triton(x):
        from moeforge.kernels.triton import grouped_matmul as kernels
        from moeforge.kernels.triton import weight_grad as weight_kernels

        sides["forward"]["triton"] = lambda: kernels.grouped_matmul(x, weight, offsets)
        sides["input_grad"]["triton"] = lambda: kernels.grouped_input_grad(grad, weight, offsets)
        sides["weight_grad"]["triton"] = lambda: weight_kernels.grouped_weight_grad(grad, x, offsets)
    return sides


@torch.inference_mode()
def decode_experts(layer: Layer, device: torch.device, rows: Sequence[int] = ROWS) -> dict[str, Any]:
    """Experts of a decode step over FP8 weights: what they read a second, as a share of what a copy moves.

    Weight-only ("fp8"), with 8-bit activations ("w8a8"), and in bf16.
    """
    shapes = (layer.experts, 2 * layer.ffn, layer.hidden), (layer.experts, layer.hidden, layer.ffn)
    w13, w2 = (random(device, *shape) for shape in shapes)
    fp8_w13, fp8_w2 = (_fp8(device, *shape) for shape in shapes)
    copied = ceilings(device)["copy_gbytes_per_second"]
    result: dict[str, Any] = {"copy_gbytes_per_second": copied}
    # As `LocalDispatcher` has it where there are no gradients.
    alignment = 1 if use_triton(w13) else row_alignment(torch.bfloat16)
    for count in rows:
        chosen = routing(layer, count, device)[1]
        sorted_rows = expert_permutation(chosen, layer.experts, alignment=alignment)
        x, offsets = random(device, sorted_rows.source_R.numel(), layer.hidden), sorted_rows.offsets_E
        sides = {
            "fp8": partial(fp8_expert_mlp, x, fp8_w13, fp8_w2, offsets),
            "w8a8": partial(fp8_expert_mlp, x, fp8_w13, fp8_w2, offsets, "dynamic"),
            "bf16": partial(expert_mlp, x, w13, w2, offsets),
        }
        able, failed = that_run(sides, "fp8")
        found = in_turn(able, ROUNDS, device)
        weights = 3.0 * layer.hidden * layer.ffn * chosen.unique().numel()
        seconds = {side: statistics.median(each) for side, each in found.items()}
        result[f"{count} sequences"] = {
            "microseconds": {side: 1e6 * each for side, each in seconds.items()},
            "fp8_share_of_copy": weights * (1 + 4 / (GROUP_ROWS * BLOCK)) / seconds["fp8"] / copied / 1e9,
            "fp8_speedup_over_bf16": ratio(found, "bf16", "fp8"),
            "failed": failed,
        }
    return result


def _fp8(device: torch.device, experts: int, rows: int, columns: int) -> Fp8Weight:
    bits = torch.randint(0, 127, (experts, rows, columns), dtype=torch.uint8, device=device)
    scales = torch.full((experts, -(-rows // GROUP_ROWS), -(-columns // BLOCK)), 1e-4, device=device)
    return Fp8Weight(bits.view(torch.float8_e4m3fn), scales)
