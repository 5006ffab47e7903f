"""The printed mesh, read against layouts drawn by hand."""

from __future__ import annotations

from typing import Any

import pytest

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import build_layout
from moeforge.parallel.table import expert_mode, mesh_table

MODEL = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=4,
    num_heads=3,
    num_kv_heads=3,
    head_dim=4,
    ffn_size=16,
    moe=MoEConfig(num_experts=16, top_k=2, expert_size=16),
)


def cells(**sizes: Any) -> list[list[str]]:
    """The lines of a table, cut at runs of two spaces or more."""
    ranks_per_node = sizes.pop("ranks_per_node", None)
    text = mesh_table(build_layout(MODEL, **sizes), ranks_per_node)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_what_a_pipeline_of_two_uneven_stages_shows() -> None:
    found = cells(pp=2, tp=3, ep=3, stages=[1.5, 2.5], recompute="all", ranks_per_node=3)
    assert found[0] == ["6 ranks = pp 2 x dp 1 x tp 3; EDP: ep 3, etp 1, expert_dp 1; schedule 1f1b"]
    assert ["tp", "3", "2", "0, 1, 2"] in found
    assert ["pp", "2", "3", "0, 3", "crosses nodes"] in found
    assert ["expert block", "3", "2", "0, 1, 2"] in found
    assert ["0", "0", "0..4", "1.5 + embedding", "2"] in found  # recompute touches two layers, one of them by half
    assert ["1", "1", "4..10", "2.5 + head", "3"] in found
    assert [row[1:] for row in found[-3:]] == [
        ["1", "6 5 5 6", "16"],  # 16 experts over 3 ranks; who has the sixth changes from layer to layer
        ["1", "5 6 5 5", "16"],
        ["1", "5 5 6 5", "16"],
    ]


@pytest.mark.parametrize(
    ("ep", "etp", "mode", "block", "expert_dp"),
    [
        (2, 1, "EDP", "0, 1", ["expert_dp", "4", "2", "0, 2, 4, 6"]),
        (8, 1, "EP", "0, 1, 2, 3, 4, 5, 6, 7", ["expert_dp", "1", "8", "0"]),
        (4, 2, "ETP", "0, 1, 2, 3, 4, 5, 6, 7", ["expert_dp", "1", "8", "0"]),
        (2, 2, "mixture", "0, 1, 2, 3", ["expert_dp", "2", "4", "0, 4"]),
    ],
)
def test_the_expert_modes_by_name(ep: int, etp: int, mode: str, block: str, expert_dp: list[str]) -> None:
    found = cells(dp=4, tp=2, ep=ep, etp=etp)
    assert expert_mode(build_layout(MODEL, dp=4, tp=2, ep=ep, etp=etp)) == mode and f"; {mode}: " in found[0][0]
    assert expert_dp in found
    assert next(row for row in found if row[:1] == ["expert block"])[3] == block


def test_groups_that_cross_nodes_are_marked_wherever_one_of_them_does() -> None:
    """dp 2 x tp 3 on nodes of 4: the first tp group lies inside a node, the second does not."""
    marked = {row[0] for row in cells(dp=2, tp=3, ep=3, ranks_per_node=4) if row and row[-1] == "crosses nodes"}
    assert marked == {"tp", "dp", "expert block", "expert_dp"}
    assert not [row for row in cells(dp=2, tp=3, ep=3) if row and row[-1] == "crosses nodes"]


def test_a_large_mesh_stays_short() -> None:
    found = cells(pp=4, dp=48, tp=8, ep=8, ranks_per_node=8)
    assert len(found) < 40 and max(len(" ".join(row)) for row in found) < 120
    assert ["dp", "48", "32", "0, 8, 16, 24, 32, 40, 48, 56, ...", "crosses nodes"] in found
