"""Weights, gradients and optimiser state of a rank against the exact parameter table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import build_layout, unit_names
from moeforge.parallel.rank_memory import rank_memory
from moeforge.plan.memory import bytes_per_parameter
from moeforge.plan.static_memory import static_bytes, unit_static_bytes, update_transient_bytes
from moeforge.plan.workload import Workload

MODEL = ModelConfig(
    vocab_size=1024, hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16, ffn_size=128,
    tie_embeddings=True, qkv_bias=True, output_bias=True,
    moe=MoEConfig(8, 2, 64, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=2),
)  # fmt: skip


def both(model: ModelConfig, precision: str, zero: bool, **sizes: Any) -> list[tuple[int, int]]:
    """Predicted and exact bytes of the largest rank of each pipeline rank."""
    layout = build_layout(model, **sizes)
    work = Workload(
        model, precision, 64, 1, 2 * layout.dp, layout.dp, layout.tp, layout.ep, layout.etp, zero=zero
    )  # fmt: skip
    rows = rank_memory(model, layout, bytes_per_parameter(precision), zero)
    found = []
    for pp in range(layout.pp):
        parts = [layout.stages[stage] for stage in layout.stages_of(pp)]
        units = [name for part in parts for name in unit_names(model)[part.begin_unit : part.end_unit]]
        found.append((static_bytes(work, units), max(row["total_bytes"] for row in rows if row["pp"] == pp)))
    return found


@pytest.mark.parametrize(
    "sizes",
    [{}, {"pp": 2}, {"pp": 2, "chunks": 2, "schedule": "zbv"}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 2, "ep": 4},
     {"tp": 2, "ep": 1, "etp": 2}],
)  # fmt: skip
@pytest.mark.parametrize(("precision", "zero"), [("bf16", True), ("fp32", False), ("bf16_pure", True)])
def test_equal_where_sizes_divide(sizes: dict[str, Any], precision: str, zero: bool) -> None:
    for model in (MODEL, replace(MODEL, qk_norm="head", tie_embeddings=False), replace(MODEL, qk_norm="full")):
        for predicted, exact in both(model, precision, zero, **sizes):
            # The router's scale is one number: of two ranks only one has its state.
            assert predicted == pytest.approx(exact, abs=64)


@pytest.mark.parametrize(
    "sizes", [{"tp": 3}, {"dp": 3, "tp": 1, "ep": 3}, {"dp": 5}, {"pp": 2, "tp": 3, "etp": 3, "ep": 1}]
)
def test_an_upper_bound_otherwise(sizes: dict[str, Any]) -> None:
    wide = replace(MODEL, num_heads=24, num_kv_heads=12, ffn_size=1100, moe=MoEConfig(16, 2, 400, layer_frequency=2))
    for predicted, exact in both(wide, "bf16", True, **sizes):
        assert exact <= predicted <= 1.1 * exact


def test_units_add_up_and_the_tied_copy_is_counted() -> None:
    work = Workload(MODEL, "bf16", 64, 1, 2)
    units = unit_names(MODEL)
    assert static_bytes(work, units) == sum(unit_static_bytes(work, unit) for unit in units)
    assert static_bytes(work, ["head"]) == unit_static_bytes(work, "head") + unit_static_bytes(work, "embed")


def test_update_needs_nothing_alone_and_one_bucket_and_sums_among_many() -> None:
    one = Workload(MODEL, "bf16", 64, 1, 2)
    assert update_transient_bytes(one, unit_names(MODEL)) == 0
    assert update_transient_bytes(replace(one, dp=2), ["embed"]) == 1024 * 64 * (4 // 2 + 2 // 2 + 2 + 2)
    assert update_transient_bytes(replace(one, dp=2, zero=False), ["embed"]) == 1024 * 64 * 4
