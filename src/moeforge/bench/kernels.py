"""Kernels of a decode step on a CPU against what the machine gives: `moeforge bench kernels`.

Each runs over as many copies of its weights as come from memory and not from a cache; ours and the peers' take turns.
The limit of a kernel is the larger of two times: of reading its weights at the bandwidth, and of its FLOPs at the
matmul rate, both measured in the same rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.bench.kernels_limits import Limits
from moeforge.bench.kernels_timing import Seconds, in_turn, ratio
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.kernels import (
    PreparedExperts,
    PreparedGate,
    PreparedWeight,
    combine,
    expert_permutation,
    gate,
    gather,
    native,
    rms_norm,
)
from moeforge.kernels.fp8 import to_e4m3
from moeforge.kernels.fp8_weight import BLOCK, GROUP_ROWS, Fp8Weight
from moeforge.kernels.linear import can_pack
from moeforge.kernels.paged_attention import paged_attention_decode, paged_attention_decode_reference
from moeforge.kernels.swiglu import swiglu_forward

ROWS = (1, 8, 32, 64)
LIVE_TOKENS = 256
"""Of every sequence whose attention is timed."""
PEERS = ("onednn", "torch")
_BYTES = {"bf16": 2.0, "fp8": 1 + 4 / (GROUP_ROWS * BLOCK)}
_FP8_SCALE = 1 / 64
_PAGE = 16
_SMALL_CALLS = 64

Linear = Callable[[Tensor], Tensor]
Call = Callable[..., Tensor]


def models() -> dict[str, ModelConfig]:
    """SmolLM2-135M upcycled to 8 experts, and a larger model with many small ones."""
    small = model_preset("smollm2-135m")
    moe = MoEConfig(num_experts=8, top_k=2, expert_size=small.ffn_size)
    return {"smollm2-135m, 8 experts": replace(small, moe=moe), "olmoe-1b-7b": model_preset("olmoe-1b-7b")}


@dataclass(frozen=True)
class KernelBench:
    """`rows` tokens at once, each case in `rounds` rounds over `working_bytes` of bf16 weights."""

    rows: Sequence[int] = ROWS
    rounds: int = 7
    working_bytes: int = 2**28

    @torch.inference_mode()
    def run(self, models: Mapping[str, ModelConfig], note: Callable[[str], None]) -> dict[str, Any]:
        """Raw results: `matmuls` and `others` with µs a call, the fraction of the limit, and `speedup_over`: times of
        others over ours; `limits`: the medians of the bandwidth and the matmul rate over all rounds."""
        torch.manual_seed(0)
        limits = Limits(self.working_bytes)
        matmuls, others = [], []
        for name, config in models.items():
            note(name)
            for kernel, shape in _linears(config).items():
                matmuls += [{"model": name, "kernel": kernel, **case} for case in self._linear(shape, limits)]
            matmuls += [{"model": name, "kernel": "experts", **case} for case in self._experts(config, limits)]
            for rows in self.rows:
                for kernel, case in self._others(config, rows, limits).items():
                    others.append({"model": name, "kernel": kernel, "rows": rows, **case})
        return {
            "device": "cpu",
            "native": native.name(),
            "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__},
            "limits": {
                "read_gbytes_per_second": statistics.median(limits.read) / 1e9,
                "bf16_gflops": statistics.median(limits.matmul) / 1e9,
            },
            "matmuls": matmuls,
            "others": others,
        }

    def _copies(self, weights: float) -> int:
        """How many copies of so many weights come from memory."""
        return max(1, math.ceil(self.working_bytes / (2 * weights)))

    def _linear(self, shape: tuple[int, int], limits: Limits) -> list[dict[str, Any]]:
        outputs, inputs = shape
        copies = [_sides(_random(shape)) for _ in range(self._copies(outputs * inputs))]
        found = []
        for rows in self.rows:
            x = _random((rows, inputs))
            calls = {side: [partial(copy[side], x) for copy in copies] for side in copies[0]}
            found.append(self._case(calls, limits, rows, float(outputs * inputs), 2.0 * rows * outputs * inputs))
        return found

    def _experts(self, config: ModelConfig, limits: Limits) -> list[dict[str, Any]]:
        moe, d = config.moe, config.hidden_size
        assert moe is not None
        each = 3 * d * moe.expert_size
        copies = [_expert_sides(config) for _ in range(self._copies(each * moe.num_experts))]
        found = []
        for rows in self.rows:
            calls: dict[str, list[Call]] = {side: [] for side in copies[0]}
            used = []
            for copy in copies:
                chosen = torch.rand(rows, moe.num_experts).topk(moe.top_k)
                arguments = _random((rows, d)), chosen.values.softmax(-1), chosen.indices
                used.append(chosen.indices.unique().numel())
                for side, call in copy.items():
                    calls[side].append(partial(call, *arguments))
            flops = 2.0 * rows * moe.top_k * each
            found.append(self._case(calls, limits, rows, each * statistics.fmean(used), flops))
        return found

    def _case(
        self, calls: Mapping[str, Sequence[Call]], limits: Limits, rows: int, weights: float, flops: float
    ) -> dict[str, Any]:
        found = limits.in_turn({side: partial(_all, each) for side, each in calls.items()}, self.rounds)
        case: dict[str, Any] = {"rows": rows}
        for side, bytes_each in _BYTES.items():
            count, read = len(calls[side]), weights * bytes_each
            microseconds = 1e6 * statistics.median(found[side]) / count
            case[side] = {"microseconds": microseconds, "read_bytes": read, "flops": flops}
            case[side] |= limits.of(found, side, count * read, count * flops)
        case["bf16"]["speedup_over"] = {peer: ratio(found, peer, "bf16") for peer in PEERS if peer in found}
        case["fp8"]["speedup_over"] = {"bf16": ratio(found, "bf16", "fp8")}
        return case

    def _others(self, config: ModelConfig, rows: int, limits: Limits) -> dict[str, dict[str, Any]]:
        """Attention, routing and norm beside what torch does."""
        moe, d, heads, groups = config.moe, config.hidden_size, config.num_heads, config.num_kv_heads
        assert moe is not None
        x, weight, router = _random((rows, d)), _random((d,)), _random((moe.num_experts, d))
        prepared = PreparedGate(router, None, moe.top_k, moe.gate_norm, moe.renormalize, torch.bfloat16)
        wide = router.float()
        q, pages_each = _random((rows, heads, config.head_dim)), -(-LIVE_TOKENS // _PAGE)
        table = torch.arange(rows * pages_each).view(rows, pages_each)
        length = torch.full((rows,), LIVE_TOKENS)
        live = 2 * rows * pages_each * _PAGE * groups * config.head_dim
        layers = min(config.num_layers, self._copies(live))
        pages = [_random((2, rows * pages_each, _PAGE, groups, config.head_dim)) for _ in range(layers)]
        attention: dict[str, list[Call]] = {
            side: [partial(function, q, layer, table, length, None) for layer in pages]
            for side, function in (("moeforge", paged_attention_decode), ("torch", paged_attention_decode_reference))
        }
        small: dict[str, dict[str, Callable[[], object]]] = {
            "routing": {
                "moeforge": partial(prepared, x),
                "torch": lambda: gate(F.linear(x.float(), wide), moe.top_k, moe.gate_norm, moe.renormalize),
            },
            "norm": {
                "moeforge": partial(rms_norm, x, weight, config.norm_eps),
                "torch": lambda: F.rms_norm(x, (d,), weight, config.norm_eps),
            },
        }
        flops = 4.0 * rows * LIVE_TOKENS * heads * config.head_dim
        times = limits.in_turn({side: partial(_all, each) for side, each in attention.items()}, self.rounds)
        found = {"attention": _beside_torch(times, layers)}
        found["attention"] |= limits.of(times, "moeforge", 2.0 * live * layers, flops * layers)
        for kernel, sides in small.items():
            calls = {side: partial(_all, [call] * _SMALL_CALLS) for side, call in sides.items()}
            found[kernel] = _beside_torch(in_turn(calls, self.rounds), _SMALL_CALLS)
        return found


def _beside_torch(found: Seconds, calls: int) -> dict[str, Any]:
    return {
        "microseconds": 1e6 * statistics.median(found["moeforge"]) / calls,
        "speedup_over": {"torch": ratio(found, "torch", "moeforge")},
    }


def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    heads, groups, h, d = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    return {"qkv": ((heads + 2 * groups) * h, d), "o": (d, heads * h), "head": (config.vocab_size, d)}


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def _fp8(weight: Tensor) -> Fp8Weight:
    *stack, rows, columns = weight.shape
    scales = torch.full((*stack, -(-rows // GROUP_ROWS), -(-columns // BLOCK)), _FP8_SCALE)
    return Fp8Weight(to_e4m3(weight / _FP8_SCALE), scales)


def _peers(weight: Tensor) -> dict[str, Linear]:
    sides: dict[str, Linear] = {"torch": partial(F.linear, weight=weight)}
    if can_pack(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        sides["onednn"] = lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    return sides


def _sides(weight: Tensor) -> dict[str, Linear]:
    ours: dict[str, Tensor | Fp8Weight] = {"bf16": weight, "fp8": _fp8(weight)}
    return {side: PreparedWeight(w, torch.bfloat16).linear for side, w in ours.items()} | _peers(weight)


def _expert_sides(config: ModelConfig) -> dict[str, Call]:
    """Of one layer: calls with x [T, D], weights [T, K] and experts [T, K]."""
    moe, d = config.moe, config.hidden_size
    assert moe is not None
    w13, w2 = (_random((moe.num_experts, *shape)) for shape in ((2 * moe.expert_size, d), (d, moe.expert_size)))
    sides: dict[str, Call] = {
        "bf16": PreparedExperts(w13, w2, torch.bfloat16).routed,
        "fp8": PreparedExperts(_fp8(w13), _fp8(w2), torch.bfloat16).routed,
    }
    up, down = ([_peers(matrix) for matrix in stack] for stack in (w13, w2))
    for peer in up[0]:
        sides[peer] = partial(_one_by_one, [each[peer] for each in up], [each[peer] for each in down])
    return sides


def _one_by_one(
    up: Sequence[Linear], down: Sequence[Linear], x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> Tensor:
    """The experts as a loop over them, with any linear maps."""
    permutation = expert_permutation(experts_TK, len(up), alignment=1)
    x_RD, y = gather(x_TD, permutation), []
    ends = permutation.offsets_E.tolist()
    for w13, w2, begin, end in zip(up, down, [0, *ends], ends, strict=False):
        if end > begin:
            y.append(w2(swiglu_forward(w13(x_RD[begin:end]))))
    return combine(torch.cat(y), weights_TK, permutation)
