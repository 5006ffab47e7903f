"""Building layouts: everything held once, as even as it goes, and mistakes named by their key."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config.model import MoEConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, Stage, build_layout, unit_names


def lengths(ranges):
    return [end - begin for begin, end in ranges]


def test_single_holds_everything(mixed):
    layout = Layout.single(mixed, "ffn")
    (shard,), (experts,) = layout.ranks, layout.expert_ranks
    assert (layout.world_size, layout.pp, layout.dp, layout.tp, layout.ep, layout.etp) == (1,) * 6
    assert layout.stages == (Stage(0, 10, tuple(f"layers.{i}.ffn" for i in range(4))),)
    assert shard.kv_groups == ((0, 3),) * 4 and shard.vocab_rows == (0, 101)
    assert shard.ffn_columns == ((0, 200), (0, 0), (0, 200), (0, 0))
    assert experts.experts == ((0, 0), (0, 5), (0, 0), (0, 5))
    assert experts.columns == ((0, 0), (0, 48), (0, 0), (0, 48))
    assert build_layout(mixed, recompute="ffn") == layout
    layout.check(mixed, 1)


@settings(max_examples=150)
@given(st.data())
def test_any_layout_covers_the_model(cases, data):
    """`check` looks at every range of every layer."""
    config, options = data.draw(cases)
    layout = build_layout(config, **options)
    layout.check(config, options["pp"] * options["dp"] * options["tp"])
    held = [layout.stages[stage] for rank in range(layout.pp) for stage in layout.stages_of(rank)]
    units = sorted(unit for stage in held for unit in range(stage.begin_unit, stage.end_unit))
    assert units == list(range(len(unit_names(config))))


@settings(max_examples=100)
@given(st.data())
def test_shares_stay_within_one_of_exact_and_so_do_totals(cases, data):
    config, options = data.draw(cases)
    layout = build_layout(config, **(options | {"weights": None}))
    routed = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    dense = [layer for layer in range(config.num_layers) if layer not in routed]
    slices = layout.expert_ranks[: layout.etp]
    experts = config.moe.num_experts if config.moe else 0
    width = config.moe.expert_size if config.moe else 0
    for layers, size, block, by_rank in (
        (range(config.num_layers), config.num_kv_heads, 1, [shard.kv_groups for shard in layout.ranks]),
        (dense, config.ffn_size, 16, [shard.ffn_columns for shard in layout.ranks]),
        (routed, experts, 1, [shard.experts for shard in layout.expert_ranks[:: layout.etp]]),
        (routed, width, 16, [shard.columns for shard in slices]),
    ):
        block = block if size >= block * len(by_rank) else 1
        # The last block may be short: where it counts as a whole, exact shares are those of whole blocks.
        share = Fraction(-(-size // block), len(by_rank))
        for ranges in by_rank:
            blocks = [-(-end // block) - -(-begin // block) for begin, end in (ranges[layer] for layer in layers)]
            assert all(abs(count - share) < 1 for count in blocks)
            assert abs(sum(blocks) - share * len(blocks)) <= 1
            for layer in layers:
                assert all(edge % block == 0 or edge == size for edge in ranges[layer])


def test_uneven_heads_rotate_over_the_layers(model):
    layout = build_layout(model(layers=2, kv_heads=36), tp=8)
    assert [lengths(shard.kv_groups) for shard in layout.ranks] == [[5, 4]] * 4 + [[4, 5]] * 4


def test_sixteen_experts_on_three_ranks_rotate(model):
    layout = build_layout(model(layers=3, moe=MoEConfig(16, 2, 64)), tp=3)
    assert [lengths(shard.experts) for shard in layout.expert_ranks] == [[6, 5, 5], [5, 6, 5], [5, 5, 6]]


def test_columns_go_by_single_ones_where_there_are_too_few_blocks(model):
    layout = build_layout(model(layers=1, ffn=47, moe=None), tp=3)
    assert [shard.ffn_columns[0] for shard in layout.ranks] == [(0, 16), (16, 32), (32, 47)]
    layout = build_layout(model(layers=1, moe=MoEConfig(4, 2, 40)), tp=4, ep=1, etp=4)
    assert [shard.columns[0] for shard in layout.expert_ranks] == [(0, 10), (10, 20), (20, 30), (30, 40)]


def test_weights_reach_experts_through_the_ranks_that_hold_them(model):
    config = model(layers=1, kv_heads=8, moe=MoEConfig(8, 2, 64))

    def experts(**sizes):
        layout = build_layout(config, weights=[3, 1], **sizes)
        return [tuple(lengths(each)[0] for each in (s.experts, s.columns)) for s in layout.expert_ranks]

    assert [lengths(s.kv_groups) for s in build_layout(config, tp=2, weights=[3, 1]).ranks] == [[6], [2]]
    assert experts(tp=2) == [(6, 64), (2, 64)]
    assert experts(tp=2, dp=2, ep=4) == [(3, 64), (1, 64), (3, 64), (1, 64)]
    assert experts(tp=2, dp=2, ep=2, etp=2) == [(4, 48), (4, 16), (4, 48), (4, 16)]
    assert experts(tp=2, ep=1, etp=1) == [(8, 64)]
    (all_of_it, nothing) = build_layout(config, tp=2, weights=[1, 0]).ranks
    assert all_of_it.kv_groups == ((0, 8),) and nothing.vocab_rows == (101, 101)


def test_stages_by_whole_and_half_layers(model):
    config = model(layers=5)
    assert build_layout(config, pp=3).stages == (Stage(0, 5), Stage(5, 9), Stage(9, 12))
    halves = build_layout(config, pp=4, stages=[1.5, 0, 2, 1.5], recompute="attention")
    assert [(stage.begin_unit, stage.end_unit) for stage in halves.stages] == [(0, 4), (4, 4), (4, 8), (8, 12)]
    assert [stage.recompute for stage in halves.stages] == [
        ("layers.0.attention", "layers.1.attention"), (), ("layers.2.attention", "layers.3.attention")[:2],
        ("layers.4.attention",),
    ]  # fmt: skip
    last = build_layout(config, pp=3, stages=[5, 0, 0])
    assert last.stages == (Stage(0, 11), Stage(11, 11), Stage(11, 12))


def test_recomputed_layers_of_each_stage(model):
    layout = build_layout(model(layers=4), pp=3, stages=[1.5, 1, 1.5], recompute_layers=[1, 2, 0])
    assert [stage.recompute for stage in layout.stages] == [
        ("layers.0.attention", "layers.0.ffn"), ("layers.1.ffn", "layers.2.attention"), (),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pp": 4}, "parallel.pp x chunks = 4: must be at most the model's 3 layers, unless parallel.stages says"),
        ({"pp": 2, "stages": [3]}, r"parallel.stages = \[3\]: must have one number for each of the 2 stages"),
        ({"pp": 2, "stages": [2, 0.5]}, r"parallel.stages = \[2, 0.5\]: must sum to the model's 3 layers, not 2.5"),
        ({"pp": 2, "stages": [2.25, 0.75]}, r"parallel.stages = \[2.25, 0.75\]: must be multiples of 0.5"),
        ({"pp": 2, "stages": [4, -1]}, r"parallel.stages = \[4, -1\]: must be multiples of 0.5 .*, not negative"),
        ({"dp": 2, "tp": 3, "ep": 4}, "parallel.ep x etp = 4 x 1: must divide dp x tp = 2 x 3"),
        ({"pp": 2, "schedule": "zbv"}, 'parallel.schedule = "zbv": takes 2 stages a rank, but there are 2 stages on 2'),
        ({"tp": 2, "weights": [1]}, "weights = 1: must have one number for each of the 2 ranks"),
        ({"pp": 2, "recompute_layers": [1]}, r"parallel.recompute_layers = \[1\]: must have one number for each of t"),
        ({"pp": 2, "recompute_layers": [0, 2]}, "parallel.recompute_layers.1 = 2: must be 0 to 1, the stage's number"),
    ],
)
def test_what_does_not_fit_is_named(model, options, line):
    with pytest.raises(UserError, match=line) as caught:
        build_layout(model(), **options)
    assert "\n" not in str(caught.value)
