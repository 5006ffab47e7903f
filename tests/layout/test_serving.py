"""Layouts for serving: everything held once, in whole units, as evenly over the layers as units allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.presets import model_preset
from moeforge.errors import UserError
from moeforge.layout import FFN_BLOCK, Layout, serving_layout


def sizes(ranges):
    return [end - begin for begin, end in ranges]


@st.composite
def models(draw) -> ModelConfig:
    groups, frequency = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    moe = MoEConfig(draw(st.integers(2, 6)), 2, draw(st.integers(9, 300)), layer_frequency=frequency or 1)
    return ModelConfig(
        vocab_size=draw(st.integers(1, 200)), hidden_size=16, num_layers=draw(st.integers(1, 12)),
        num_heads=groups * draw(st.integers(1, 3)), num_kv_heads=groups, head_dim=4,
        ffn_size=draw(st.integers(9, 300)), moe=moe if frequency else None,
    )  # fmt: skip


@settings(max_examples=150)
@given(models(), st.integers(1, 9))
def test_equal_ranks_hold_everything_once_and_differ_by_one_unit_over_all_layers(config, tp):
    layout = serving_layout(config, tp)
    layout.check(config, tp)
    assert Layout.from_json(layout.to_json()) == layout
    assert (layout.pp, layout.dp, layout.ep, layout.etp, len(layout.stages)) == (1, 1, 1, tp, 1)

    groups = [sizes(shard.kv_groups) for shard in layout.ranks]
    held = [sum(of_rank) for of_rank in groups]
    assert max(held) - min(held) <= 1 and sum(held) == config.num_layers * config.num_kv_heads
    for layer in zip(*groups, strict=True):
        assert max(layer) - min(layer) <= 1

    routed = set(config.moe_layers)
    dense = [layer for layer in range(config.num_layers) if layer not in routed]
    experts = config.moe.num_experts if config.moe else 0
    for shard in layout.expert_ranks:
        assert all(span == ((0, experts) if i in routed else (0, 0)) for i, span in enumerate(shard.experts))
    for layers, width, by_rank in (
        (dense, config.ffn_size, [shard.ffn_columns for shard in layout.ranks]),
        (sorted(routed), config.moe.expert_size if config.moe else 0, [s.columns for s in layout.expert_ranks]),
    ):
        block = FFN_BLOCK if width >= FFN_BLOCK * tp else 1
        assert all(edge % block == 0 or edge == width for of_rank in by_rank for i in layers for edge in of_rank[i])
        blocks = [sum(-(-size // block) for size in sizes([of_rank[i] for i in layers])) for of_rank in by_rank]
        assert max(blocks) - min(blocks) <= 1


@settings(max_examples=100)
@given(models(), st.lists(st.integers(0, 48), min_size=1, max_size=9).filter(any))
def test_any_weights_cover_the_model_in_whole_blocks(config, weights):
    layout = serving_layout(config, len(weights), weights)
    layout.check(config, len(weights))
    for weight, shard, experts in zip(weights, layout.ranks, layout.expert_ranks, strict=True):
        if not weight:
            assert not any(sizes([*shard.kv_groups, *shard.ffn_columns, *experts.columns, shard.vocab_rows]))


def test_skywork_moe_on_eight_equal_ranks_averages_four_and_a_half_heads():
    layout = serving_layout(model_preset("skywork-moe"), 8)
    assert [sizes(shard.kv_groups)[:2] for shard in layout.ranks] == [[5, 4]] * 4 + [[4, 5]] * 4
    assert {sum(sizes(shard.kv_groups)) for shard in layout.ranks} == {234}
    assert {size for shard in layout.expert_ranks for size in sizes(shard.columns)} == {1536}
    assert sizes(shard.vocab_rows for shard in layout.ranks) == [8192] * 4 + [8191] * 4


def test_more_ranks_than_kv_groups_take_turns():
    layout = serving_layout(model_preset("smollm2-135m"), 7)
    held = [sizes(shard.kv_groups) for shard in layout.ranks]
    assert {size for of_rank in held for size in of_rank} == {0, 1}
    assert sorted(map(sum, held)) == [12] + [13] * 6


def test_memory_decides_where_it_is_uneven():
    layout = serving_layout(model_preset("skywork-moe"), 3, [24, 24, 12])
    assert [sum(sizes(shard.kv_groups)) / 52 for shard in layout.ranks] == pytest.approx([14.4, 14.4, 7.2], abs=0.05)


def test_what_cannot_be_shared_is_refused():
    config = model_preset("smollm2-135m")
    serving_layout(config, 1536).check(config, 1536)  # a column each
    with pytest.raises(UserError, match="tensor_parallel_size = 1537: must be at most 1536, the columns of the"):
        serving_layout(config, 1537)
    with pytest.raises(UserError, match="tensor_parallel_size = 0: must be at least 1"):
        serving_layout(config, 0)
    with pytest.raises(UserError, match="weights = 1,2: must have one number for each of the 3 ranks"):
        serving_layout(config, 3, [1, 2])
