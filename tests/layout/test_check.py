"""Layouts that were written by hand, or for something else."""

from dataclasses import replace

import pytest

from moeforge.errors import UserError
from moeforge.layout import Layout, Stage, build_layout


def test_names_both_fingerprints_and_both_world_sizes(mixed, model):
    layout = Layout.single(mixed)
    other = model()
    with pytest.raises(UserError, match=f"{mixed.fingerprint()}.*{other.fingerprint()}"):
        layout.check(other, 1)
    with pytest.raises(UserError, match="world_size = 1: the plan needs 1 processes, but 4 run"):
        layout.check(mixed, 4)


def test_empty_stages_and_ends_anywhere_are_allowed(mixed):
    layout = build_layout(mixed, pp=4)
    for spans in (
        [(0, 0), (0, 10), (10, 10), (10, 10)],
        [(0, 1), (1, 1), (1, 9), (9, 10)],
        [(0, 2), (2, 3), (3, 3), (3, 10)],
    ):
        replace(layout, stages=tuple(Stage(*span) for span in spans)).check(mixed, 4)


def test_a_rank_may_hold_nothing(mixed):
    layout = build_layout(mixed, tp=2)
    none = replace(layout.ranks[0], kv_groups=((0, 0),) * 4)
    rest = replace(layout.ranks[1], kv_groups=((0, 3),) * 4)
    replace(layout, ranks=(none, rest)).check(mixed, 2)
    build_layout(mixed, tp=8, ep=8).check(mixed, 8)  # 5 experts, 3 KV groups


def _ranks(layout, rank, **changes):
    return tuple(replace(s, **changes) if i == rank else s for i, s in enumerate(layout.ranks))


def _block(layout, rank, layer, **changes):
    """The expert ranks, one range of one of them changed."""
    shards = list(layout.expert_ranks)
    for key, span in changes.items():
        ranges = list(getattr(shards[rank], key))
        ranges[layer] = span
        shards[rank] = replace(shards[rank], **{key: tuple(ranges)})
    return tuple(shards)


# pp 2, dp 2, tp 2, ep 2, etp 2 of four layers, the second and fourth with 5 experts of 48 columns
CHANGES = {
    "hole": (
        lambda x: {"stages": (Stage(0, 4), Stage(5, 10))},
        r"layout stages: range \[5, 10\] must begin at 4, and not end before it",
    ),
    "backwards": (lambda x: {"stages": (Stage(0, 4), Stage(4, 3))}, r"stages: range \[4, 3\] must begin at 4, and not"),
    "short": (lambda x: {"stages": (Stage(0, 4), Stage(4, 9))}, "stages: the last range ends at 9, must end at 10"),
    "three stages": (
        lambda x: {"stages": (Stage(0, 4), Stage(4, 9), Stage(9, 10))},
        'parallel.schedule = "1f1b": takes 1 stages a rank, but there are 3 stages on 2 pipeline ranks',
    ),
    "no stages": (lambda x: {"stages": ()}, "stages: the last range ends at 0, must end at 10"),
    "schedule": (lambda x: {"schedule": "gpipe"}, 'parallel.schedule = "gpipe": must be one of 1f1b, inter'),
    "foreign unit": (
        lambda x: {"stages": (Stage(0, 5, ("layers.9.ffn",)), Stage(5, 10))},
        'layout stages.0.recompute = "layers.9.ffn": not a layer of that stage',
    ),
    "unit of another stage": (
        lambda x: {"stages": (Stage(0, 5), Stage(5, 10, ("layers.0.ffn",)))},
        'stages.1.recompute = "layers.0.ffn": not a layer of that stage',
    ),
    "recomputed head": (
        lambda x: {"stages": (Stage(0, 5), Stage(5, 10, ("head",)))},
        'stages.1.recompute = "head": not a layer of that stage',
    ),
    "zero": (lambda x: {"dp": 0}, "layout dp = 0: must be at least 1"),
    "product": (lambda x: {"dp": 3}, "layout world_size = 8: must be pp x dp x tp = 2 x 3 x 2 = 12"),
    "no ranks": (lambda x: {"ranks": ()}, "layout ranks = .*: must have an entry for each"),
    "ep": (lambda x: {"ep": 3}, "layout ep x etp = 3 x 2: must divide dp x tp = 2 x 2"),
    "block": (
        lambda x: {"expert_ranks": x.expert_ranks[:3]}, "layout expert_ranks: has 3 entries, must have ep x etp = 4"
    ),
    "layers": (
        lambda x: {"ranks": _ranks(x, 1, kv_groups=((2, 3),))},
        "layout ranks.1.kv_groups: has 1 ranges, must have one for each of the 4 layers",
    ),
    "vocabulary": (
        lambda x: {"ranks": _ranks(x, 1, vocab_rows=(51, 100))}, "vocab_rows: the last range ends at 100, must end at 1"
    ),
    "heads": (
        lambda x: {"ranks": _ranks(x, 0, kv_groups=((0, 1), (0, 2), (0, 2), (0, 3)))},
        r"kv_groups of layer 0: range \[2, 3\] must begin at 1",
    ),
    "dense columns in a routed layer": (
        lambda x: {"ranks": _ranks(x, 1, ffn_columns=(*x.ranks[1].ffn_columns[:3], (0, 48)))},
        r"ffn_columns of layer 3, rank 1 = \[0, 48\]: must be \[0, 0\], the layer is routed",
    ),
    "experts in a dense layer": (
        lambda x: {"expert_ranks": _block(x, 2, 0, experts=(0, 5))},
        r"experts of layer 0, rank 2 = \[0, 5\]: must be \[0, 0\], the layer is dense",
    ),
    "experts missing": (
        lambda x: {"expert_ranks": _block(x, 2, 1, experts=(3, 4))},
        "experts of layer 1: the last range ends at 4, must end at 5",
    ),
    "no product of experts": (
        lambda x: {"expert_ranks": _block(x, 1, 1, experts=(0, 2))},
        r"expert_ranks.1.experts.1 = \[0, 2\]: must be \[0, 3\], as on all ranks with ep rank 0",
    ),
    "no product of columns": (
        lambda x: {"expert_ranks": _block(x, 3, 3, columns=(0, 48))},
        r"expert_ranks.3.columns.3 = \[0, 48\]: must be \[16, 48\], as on all ranks with etp rank 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_layout_is_refused_in_one_line_that_says_where(mixed, name):
    layout = build_layout(mixed, pp=2, dp=2, tp=2, ep=2, etp=2)
    layout.check(mixed, 8)
    change, line = CHANGES[name]
    with pytest.raises(UserError, match=line) as caught:
        replace(layout, **change(layout)).check(mixed, 8)
    assert "\n" not in str(caught.value)
