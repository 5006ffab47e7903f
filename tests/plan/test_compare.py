"""The expert modes of a cluster shape side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from moeforge.config.clusters import load_hardware
from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.plan.arrangement import Arrangement
from moeforge.plan.compare import ModeCost, ModeRow, compare_modes, flat, mode_cost
from moeforge.plan.workload import Workload

SMALL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, ffn_size=64,
    moe=MoEConfig(num_experts=8, top_k=2, expert_size=64),
)  # fmt: skip
SKYWORK = model_preset("skywork-moe")


def compared(
    model: ModelConfig, cluster: str, pp: int, dp: int, tp: int, sequence_length: int = 8192, per_pipeline: int = 64,
    precision: str = "bf16", **options: Any,
) -> list[ModeRow]:  # fmt: skip
    work = Workload(model, precision, sequence_length, 1, dp * per_pipeline, dp, tp, **options)
    return compare_modes(load_hardware(cluster), work, Arrangement(pp, dp, tp, tp, 1, "1f1b", 1, 1))


def by_name(rows: list[ModeRow]) -> dict[str, ModeRow]:
    return {row.mode: row for row in rows if row.mode != "custom"}


def cost(row: ModeRow) -> ModeCost:
    assert row.cost is not None
    return row.cost


def test_bytes_by_hand() -> None:
    """Two nodes of two, dp 2 x tp 2; two micro-batches of 16 tokens, 8 on a rank: a row of hidden states is 128 bytes,
    a rank's tokens are 1,024; both layers are sparse."""
    rows = by_name(compared(SMALL, "2x2-cpu", 1, 2, 2, sequence_length=16, per_pipeline=2, precision="fp32"))
    passes = 2 * 2  # micro-batches, layers
    # EDP: to the other rank of the block all tokens and back, forward and backward; two gate weights a token in both,
    # two expert numbers of 8 bytes in the forward.
    edp = cost(rows["edp"])
    assert edp.tokens_inside_bytes == passes * (4 * 1024 + 2 * 8 * 2 * 4 + 8 * 2 * 8) and edp.tokens_across_bytes == 0
    # EP: of a token's two rows three quarters leave the rank, two thirds of those the node; counts for 8 experts.
    ep = cost(rows["ep"])
    sent = passes * (4 * 1024 * 2 * 3 // 4 + 8 * 8 * 3)
    assert (ep.tokens_inside_bytes, ep.tokens_across_bytes) == (sent // 3, 2 * sent // 3)
    # ETP: every row goes to two ranks; all tokens to all three others is no more.
    etp = cost(rows["etp"])
    sent = 3 * passes * (4 * 1024 + 2 * 8 * 2 * 4 + 8 * 2 * 8)
    assert (etp.tokens_inside_bytes, etp.tokens_across_bytes) == (sent // 3, 2 * sent // 3)
    # Four experts of 3 x 32 x 64 weights in two layers: half of the gradients to the other copy, half of the weights.
    assert (edp.experts_inside_bytes, edp.experts_across_bytes) == (0, 2 * 2 * 4 * (4 * 3 * 32 * 64 // 2))
    assert ep.experts_across_bytes == etp.experts_across_bytes == 0
    # Out of the embedding, into and out of two attentions, into the head; gate decisions; maximum, sum and target.
    regions = 2 * 1024 + 2 * 4 * 1024 + 2 * 1024 + 2 * 8 * (3 * 8 + 2) * 4 + 2 * 8 * (1 + 2) * 4
    assert {(cost(row).tp_inside_bytes, cost(row).tp_across_bytes) for row in rows.values()} == {(2 * regions, 0)}


MEASURED = {  # five steps of all four ranks: to experts and back inside, across nodes; experts' gradients and weights
    "edp": (2_560_512, 0, 4_423_680),
    "ep": (1_324_032, 2_567_680, 0),
    "etp": (2_831_872, 4_822_016, 0),
}


def test_the_table_that_real_runs_made() -> None:
    """docs/parallel.md: its 256 tokens a step chose experts by chance, alike within a sequence; the rest is exact."""
    model = replace(SMALL, num_layers=4, moe=MoEConfig(num_experts=6, top_k=2, expert_size=48))
    work = Workload(model, "fp32", 32, 4, 8, 2, 2, overlap_chunks=2)  # chunks: always an all-to-all
    hardware = load_hardware("2x2-cpu")
    for mode, (ep, etp) in {"edp": (2, 1), "ep": (4, 1), "etp": (2, 2)}.items():
        found = mode_cost(hardware, replace(work, ep=ep, etp=etp), 1)
        inside, across, experts = MEASURED[mode]
        assert 5 * 4 * found.tokens_inside_bytes == pytest.approx(inside, rel=0.1)
        assert 5 * 4 * found.tokens_across_bytes == pytest.approx(across, rel=0.1)
        assert 5 * 4 * found.experts_across_bytes == experts


def test_on_the_flagship_ep_and_etp_lack_experts() -> None:
    rows = compared(SKYWORK, "192x8-a800", 12, 32, 4)
    assert [row.mode for row in rows[:3]] == ["edp", "ep", "etp"]
    named = by_name(rows)
    assert named["ep"].reason == "needs 128 experts, the model has 16"
    assert named["etp"].reason == "needs 32 experts, the model has 16"
    for mode in ("ep", "etp"):
        assert not named[mode].feasible and named[mode].cost is named[mode].plan is None
    edp = named["edp"]
    assert edp.feasible and edp.reason is None and edp.plan is not None and edp.expert_dp == 32
    assert cost(edp).tokens_across_bytes == 0 < cost(edp).tokens_inside_bytes
    assert {(row.ep, row.etp) for row in rows[3:]} == {
        (1, 1), (2, 1), (8, 1), (16, 1), (1, 4), (2, 4), (4, 4), (8, 4), (16, 4)
    }  # fmt: skip
    assert all(row.feasible for row in rows[3:])


def test_where_all_three_have_experts_enough() -> None:
    """16 ranks a stage: EDP's copies are too large for the memory; the others send tokens across nodes."""
    rows = by_name(compared(SKYWORK, "8x8-h100", 4, 4, 4))
    assert all(row.feasible for row in rows.values())
    assert not cost(rows["edp"]).weights_fit and rows["edp"].plan is None
    assert "82.3 GB of the 78.7 GB" in str(rows["edp"].reason)
    assert 0 < cost(rows["ep"]).tokens_across_bytes < cost(rows["etp"]).tokens_across_bytes
    ep, etp = rows["ep"].plan, rows["etp"].plan
    assert ep is not None and etp is not None and ep.step_seconds < etp.step_seconds
    assert ep.tokens_per_second_per_gpu == pytest.approx(4 * 64 * 8192 / 64 / ep.step_seconds)
    assert ep.peak_bytes <= load_hardware("8x8-h100").usable_bytes


@pytest.mark.parametrize(("cluster", "tp"), [("4x4-cpu", 2), ("4x4-cpu", 4), ("2x8-cpu", 8), ("2x8-cpu", 1)])
def test_edp_sends_no_tokens_across_nodes_while_tp_fits_one(cluster: str, tp: int) -> None:
    dp = 16 // tp
    rows = by_name(compared(SMALL, cluster, 1, dp, tp, sequence_length=64, per_pipeline=2))
    assert cost(rows["edp"]).tokens_across_bytes == 0
    across = compared(SMALL, "8x2-cpu", 1, 4, 4, sequence_length=64, per_pipeline=2)
    assert cost(by_name(across)["edp"]).tokens_across_bytes > 0


def test_overlap_hides_waiting_and_imbalance_adds_to_it() -> None:
    plain, chunked, worse = (
        cost(by_name(compared(SKYWORK, "8x8-h100", 4, 4, 4, **options))["ep"])
        for options in ({}, {"overlap_chunks": 4}, {"imbalance": 1.5})
    )
    assert 0 < chunked.tokens_exposed_seconds < 0.5 * plain.tokens_exposed_seconds
    assert worse.tokens_exposed_seconds > 1.3 * plain.tokens_exposed_seconds
    assert chunked.tokens_across_bytes == pytest.approx(plain.tokens_across_bytes, rel=1e-3)


def test_modes_that_are_the_same_are_shown_alike() -> None:
    """Without replicas EP is EDP, and no mixture repeats a mode with a name."""
    rows = compared(SMALL, "1x4-cpu", 1, 1, 4, sequence_length=64, per_pipeline=2)
    named = by_name(rows)
    assert named["ep"] == replace(named["edp"], mode="ep")
    pairs = [(row.ep, row.etp) for row in rows]
    assert pairs[:3] == [(4, 1), (4, 1), (1, 4)] and len(set(pairs[3:])) == len(pairs[3:])
    assert not set(pairs[3:]) & set(pairs[:3])


def test_flat_rows_are_json_with_the_same_keys() -> None:
    rows = [flat(row) for row in compared(SKYWORK, "8x8-h100", 4, 4, 4)]
    assert json.loads(json.dumps(rows)) == rows
    assert len({tuple(row) for row in rows}) == 1
    edp, ep = rows[0], rows[1]
    assert (edp["fits"], edp["step_seconds"], ep["fits"]) == (False, None, True)
    assert edp["static_bytes"] > ep["static_bytes"] > 0 and ep["step_seconds"] > 0
