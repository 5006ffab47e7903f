"""The activation model against MemTracker, unit lists of one process and of two."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeforge.bench.activation_memory import Case, compare, measured_bytes, predicted_stage
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.kernels import experts, fp8_training
from moeforge.layout import Layout, build_layout, unit_names
from moeforge.model.units import Experts
from moeforge.parallel import Mesh
from moeforge.plan import activations
from moeforge.plan.activations import unit_activations
from moeforge.plan.expert_activations import padding_rows
from moeforge.plan.stage_memory import stage_activations, stage_boundary
from moeforge.plan.workload import Workload

DENSE = ModelConfig(
    vocab_size=512, hidden_size=192, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, ffn_size=512,
)  # fmt: skip
MOE = replace(DENSE, moe=MoEConfig(8, 2, 192, gate_norm=1.0))
TOP_1 = replace(DENSE, moe=MoEConfig(8, 1, 192, renormalize=False, layer_frequency=2))
CASES = [
    Case("dense", DENSE, "bf16", 1, 512),
    Case("pure", replace(DENSE, tie_embeddings=True), "bf16_pure", 1, 512),
    Case("recomputed", replace(DENSE, num_kv_heads=6), "fp32", 1, 512, "all"),
    Case("some recomputed", DENSE, "bf16", 2, 256, ("layers.1.attention", "layers.2.ffn")),
    Case("norms of heads", replace(DENSE, qk_norm="head", qkv_bias=True), "bf16", 1, 512),
    Case("norms of all heads", replace(DENSE, qk_norm="full", output_bias=True), "fp32", 1, 512),
    Case("one group and a window", replace(DENSE, num_kv_heads=1, sliding_window=64), "fp64", 2, 256),
    Case("experts", MOE, "bf16", 2, 512),
    Case("experts recomputed", MOE, "fp32", 1, 512, "ffn"),
    Case("some experts, one choice", TOP_1, "fp32", 1, 512),
    Case("experts in float64", MOE, "fp64", 1, 512),
]


@pytest.fixture(autouse=True)
def _grouped_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, which planning is for; on CPUs experts take turns, and less is alive at once."""
    monkeypatch.setattr(experts, "_passes", lambda x, fp8: experts._FP8 if fp8 else experts._GROUPED)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_process(case: Case) -> None:
    found = compare(case)
    assert abs(found["error"]) <= 0.02, found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_several_chunks_of_logits_of_odd_length(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(importlib.import_module("moeforge.kernels.cross_entropy"), "_CHUNK", 384)
    monkeypatch.setattr(activations, "_CHUNK", 384)
    found = compare(Case("odd", replace(DENSE, vocab_size=4097, num_layers=1), precision, 1, 512))
    assert abs(found["error"]) <= 0.01, found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "ffn"])
def test_experts_in_fp8(monkeypatch: pytest.MonkeyPatch, precision: str, recompute: str) -> None:
    """As on sm_90, of whose rounding and product there are only the results here."""

    def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(x.shape, dtype=torch.float8_e4m3fn), torch.zeros(*x.shape[:-1], 1)

    def product(x: torch.Tensor, weight: torch.Tensor, *scales: Any, offs: Any, out_dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(x), weight.shape[2], dtype=out_dtype)

    monkeypatch.setattr(Experts, "trains_in_fp8", True)
    monkeypatch.setattr(fp8_training, "_scaled_grouped_mm_takes", lambda *operands: True)
    monkeypatch.setattr(fp8_training, "_round", rounded)
    monkeypatch.setattr(fp8_training, "_rounded", rounded)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", product)
    layout = build_layout(MOE, recompute=recompute)
    measured = measured_bytes(layout, Mesh.single(layout, torch.device("cpu")), MOE, precision, 2, 512)
    same = Workload(MOE, precision, 512, 2, 4)
    peaks = []
    for work in (same, replace(same, expert_precision="fp8")):
        stage = predicted_stage(work, layout, 0)
        peaks.append(stage.kept + max(stage.forward_transient, stage.backward_transient))
    assert peaks[1] == pytest.approx(measured, rel=0.01) and peaks[0] < 0.98 * measured


def _rank(rank: int, model: ModelConfig, layout: Layout, precision: str) -> tuple[int, list[int]]:
    """Peak bytes, and the rows of the experts' buffers of each layer, which change with the routing."""
    rows, forward = list[int](), Experts.forward

    def counted(self: Experts, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return forward(self, x, offsets)

    Experts.forward = counted  # type: ignore[method-assign]
    mesh = Mesh.create(layout, torch.device("cpu"))
    return measured_bytes(layout, mesh, model, precision, 1, 512, count=1), rows[-len(model.moe_layers) :]


@pytest.mark.parametrize(
    ("model", "precision", "sizes"),
    [
        pytest.param(DENSE, "bf16", {"tp": 2}, id="tensor parallel"),
        pytest.param(MOE, "bf16", {"tp": 2}, id="EDP, all-gather"),
        pytest.param(TOP_1, "fp32", {"dp": 2, "ep": 2}, id="EP, all-to-all"),
        pytest.param(MOE, "fp32", {"tp": 2, "ep": 1, "etp": 2}, id="ETP"),
    ],
)
def test_two_processes(
    run_ranks: Callable[..., list[Any]], model: ModelConfig, precision: str, sizes: dict[str, int]
) -> None:
    layout = build_layout(model, **sizes)
    work = Workload(model, precision, 512, 1, 2, layout.dp, layout.tp, layout.ep, layout.etp)
    names = unit_names(model)
    for measured, rows in run_ranks(2, _rank, model, layout, precision):
        units = []
        for name in names:
            of_layer = work
            if name.endswith(".ffn") and rows and model.is_moe_layer(int(name.split(".")[1])):
                received = rows[model.moe_layers.index(int(name.split(".")[1]))]
                even = replace(work, imbalance=1.0).received_rows
                of_layer = replace(work, imbalance=(received - padding_rows(work)) / even)
            units.append((unit_activations(of_layer, name), False))
        stage = stage_activations(units, stage_boundary(work, names))
        predicted = stage.kept + max(stage.forward_transient, stage.backward_transient)
        assert predicted == pytest.approx(measured, rel=0.02)


def test_shares_shrink() -> None:
    one = Workload(MOE, "bf16", 512, 1, 2)
    two = replace(one, tp=2, ep=2)
    for name in ("layers.0.attention", "layers.0.ffn", "head"):
        assert unit_activations(two, name).checkpoint * 2 == unit_activations(one, name).checkpoint
        assert unit_activations(two, name).kept < unit_activations(one, name).kept
    busy = unit_activations(replace(two, imbalance=1.5), "layers.0.ffn")
    assert busy.kept > unit_activations(two, "layers.0.ffn").kept
    assert unit_activations(one, "embed").kept == 0
