"""Stages and ranks: sums and maxima by hand, pipelines against MemTracker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeforge.bench.activation_memory import measured_bytes, predicted_stage
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.kernels import experts
from moeforge.layout import Layout, build_layout
from moeforge.parallel import Mesh
from moeforge.plan.actions import Action, schedule_actions
from moeforge.plan.activations import UnitActivations
from moeforge.plan.stage_memory import (
    Boundary,
    StageActivations,
    peak_activation_bytes,
    stage_activations,
    stage_boundary,
)
from moeforge.plan.workload import Workload

MODEL = ModelConfig(
    vocab_size=1024, hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, ffn_size=512,
)  # fmt: skip
ROUTED = replace(MODEL, moe=MoEConfig(8, 2, 192, gate_norm=1.0))
FIRST, LAST = UnitActivations(100, 10, 30, 50, 60, 20), UnitActivations(200, 10, 20, 40, 45, 25)


def test_transients_come_on_top_of_the_units_before() -> None:
    stage = stage_activations([(FIRST, False), (LAST, False)], Boundary(5))
    assert (stage.kept, stage.forward_transient, stage.backward_transient) == (305, 20, 40)
    tied = stage_activations([(FIRST, False), (LAST, False)], Boundary(5), tied_gradient=300)
    assert tied.kept + tied.backward_transient == 5 + 100 + 50 + 300
    assert tied.whole
    assert (stage.held_gradients, stage.input_transient, stage.whole) == (45, 85, False)


def test_recomputed_units_keep_their_input_and_run_their_forward_beside_a_gradient() -> None:
    stage = stage_activations([(FIRST, True), (LAST, True)], Boundary(0))
    assert stage.kept == 20
    assert stage.whole
    assert stage.kept + stage.backward_transient == 10 + 200 + max(40, 20 + 10)


def test_empty_stage() -> None:
    assert stage_activations([], Boundary(7)) == StageActivations(7, 0, 0)


def test_peak_of_a_list_of_actions() -> None:
    stages = {0: StageActivations(100, 10, 20), 1: StageActivations(50, 5, 60)}
    actions = [Action(0, "F", 0), Action(0, "F", 1), Action(1, "F", 0), Action(1, "B", 0), Action(0, "B", 0)]
    assert peak_activation_bytes(actions[:2], stages) == 210
    assert peak_activation_bytes(actions, stages) == 310
    split = StageActivations(100, 10, 20, input_transient=30, held_gradients=25, weight_transient=3, sent_gradient=8)
    walk = [Action(1, "F", 0), Action(1, "I", 0), Action(1, "F", 1), Action(1, "W", 0)]
    assert peak_activation_bytes(walk, {1: split}) == 100 + 25 + 8 + 100 + 10
    assert peak_activation_bytes(walk, {1: replace(split, whole=True)}) == 120


def test_receive_buffers_persist() -> None:
    work = Workload(MODEL, "bf16", 512, 1, 8)
    hidden = 512 * 192 * 2
    middle = stage_boundary(work, ("layers.1.attention",), "1f1b")
    assert middle.persistent == 17 * hidden
    assert stage_boundary(work, ("embed", "layers.0.attention"), "1f1b").persistent == 8 * hidden
    assert stage_boundary(work, ("head",)).persistent == 0
    assert stage_boundary(work, (), "1f1b") == Boundary(hidden, persistent=17 * hidden)
    assert stage_boundary(work, ()) == Boundary(0)


@pytest.fixture(autouse=True)
def _grouped_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, which planning is for; on CPUs experts take turns, and less is alive at once."""
    monkeypatch.setattr(experts, "_passes", lambda x, fp8: experts._GROUPED)


def _rank(rank: int, model: ModelConfig, layout: Layout, precision: str, count: int) -> int:
    return measured_bytes(layout, Mesh.create(layout, torch.device("cpu")), model, precision, 1, 512, count)


@pytest.mark.parametrize(
    ("model", "precision", "sizes", "allowed"),
    [
        pytest.param(MODEL, "bf16", {}, 0.02, id="1f1b"),
        pytest.param(MODEL, "fp32", {"recompute": "ffn"}, 0.02, id="1f1b, recomputed"),
        pytest.param(MODEL, "fp32", {"chunks": 2, "schedule": "interleaved-1f1b"}, 0.02, id="interleaved"),
        # What a split backward computes at what moment is only bounded.
        pytest.param(MODEL, "bf16", {"schedule": "zero-bubble"}, 0.03, id="zero-bubble"),
        pytest.param(ROUTED, "fp32", {"schedule": "zero-bubble"}, 0.03, id="zero-bubble, experts"),
        pytest.param(MODEL, "fp32", {"chunks": 2, "schedule": "zbv"}, 0.04, id="zbv", marks=pytest.mark.slow),
    ],
)
def test_pipelines(
    run_ranks: Callable[..., list[Any]], model: ModelConfig, precision: str, sizes: dict[str, Any], allowed: float
) -> None:
    layout, count = build_layout(model, pp=2, **sizes), 4
    work = Workload(model, precision, 512, 1, count)
    stages = {stage: predicted_stage(work, layout, stage) for stage in range(len(layout.stages))}
    measured = run_ranks(2, _rank, model, layout, precision, count)
    for rank, actions in enumerate(schedule_actions(layout.schedule, 2, layout.chunks, count)):
        sending = work.own_tokens * 192 * (2 if precision == "bf16" else 4) * (rank and layout.schedule == "1f1b")
        assert peak_activation_bytes(actions, stages) + sending == pytest.approx(measured[rank], rel=allowed)
