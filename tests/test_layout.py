"""Layouts as data: exact ranges, round trip, and the refusal of a plan made for something else."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, Stage, resolve_recompute, unit_names


def model(layers=3, kv_heads=3, ffn=200, vocab=101, moe=None) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, hidden_size=24, num_layers=layers, num_heads=kv_heads * 2, num_kv_heads=kv_heads,
        head_dim=4, ffn_size=ffn, moe=moe,
    )  # fmt: skip


MIXED = model(layers=4, moe=MoEConfig(num_experts=5, top_k=2, expert_size=48, layer_frequency=2))


def test_units_are_a_flat_list():
    assert unit_names(model(layers=2)) == (
        "embed", "layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn", "head",
    )  # fmt: skip


def test_single_holds_everything():
    layout = Layout.single(MIXED, "ffn")
    (shard,) = layout.ranks
    assert layout.world_size == 1
    assert layout.stages == (Stage(0, 10, tuple(f"layers.{i}.ffn" for i in range(4))),)
    assert shard.kv_groups == ((0, 3),) * 4
    assert shard.ffn_columns == ((0, 200), (0, 48), (0, 200), (0, 48))
    assert shard.experts == ((0, 0), (0, 5), (0, 0), (0, 5))
    assert shard.vocab_rows == (0, 101)
    layout.check(MIXED, 1)


def test_uneven_heads_rotate_over_the_layers():
    layout = Layout.tensor_parallel(model(layers=2, kv_heads=36), 8)
    heads = [[end - begin for begin, end in shard.kv_groups] for shard in layout.ranks]
    assert heads == [[5, 4]] * 4 + [[4, 5]] * 4


@settings(max_examples=60)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 400), st.integers(0, 3), st.data())
def test_any_tensor_parallel_layout_covers_the_model_and_survives_json(ranks, kv_heads, ffn, frequency, data):
    moe = MoEConfig(5, 2, 48, layer_frequency=frequency) if frequency else None
    config = model(layers=4, kv_heads=kv_heads, ffn=ffn, moe=moe)
    weights = data.draw(st.none() | st.lists(st.integers(1, 80), min_size=ranks, max_size=ranks))
    layout = Layout.tensor_parallel(config, ranks, weights, recompute=["layers.1.ffn"])
    layout.check(config, ranks)
    for shard in layout.ranks:
        for layer, (begin, end) in enumerate(shard.ffn_columns):
            if not config.is_moe_layer(layer):
                assert begin == min(begin // 16 * 16, ffn) or begin == ffn
                assert end % 16 == 0 or end == ffn
    assert Layout.from_json(layout.to_json()) == layout


def test_check_names_both_fingerprints_and_both_world_sizes():
    layout = Layout.single(MIXED)
    other = model()
    with pytest.raises(UserError, match=f"{MIXED.fingerprint()}.*{other.fingerprint()}"):
        layout.check(other, 1)
    with pytest.raises(UserError, match="needs 1 processes, but 4 run"):
        layout.check(MIXED, 4)


def test_check_refuses_holes_and_foreign_units():
    layout = Layout.tensor_parallel(MIXED, 2)
    with pytest.raises(UserError, match=r"stages: range 5\.\.10 does not continue at 4"):
        dataclasses.replace(layout, stages=(Stage(0, 4), Stage(5, 10))).check(MIXED, 2)
    with pytest.raises(UserError, match="vocab_rows: end at 51, must end at 101"):
        dataclasses.replace(layout, ranks=layout.ranks[:1]).check(MIXED, 2)
    with pytest.raises(UserError, match=r'stages.0.recompute = "layers.9.ffn"'):
        dataclasses.replace(layout, stages=(Stage(0, 10, ("layers.9.ffn",)),)).check(MIXED, 2)
    with pytest.raises(UserError, match="experts must be whole"):
        shard = layout.ranks[0]
        narrow = dataclasses.replace(shard, ffn_columns=shard.ffn_columns[:3] + ((0, 16),))
        dataclasses.replace(layout, ranks=(narrow, layout.ranks[1])).check(MIXED, 2)


def test_file_round_trip_and_unreadable_files(tmp_path):
    layout = Layout.single(MIXED)
    path = tmp_path / "plans" / "layout.json"
    layout.write(path)
    assert Layout.read(path) == layout
    assert [entry.name for entry in path.parent.iterdir()] == ["layout.json"]
    with pytest.raises(UserError, match=r"missing.json: cannot read the layout \(No such file"):
        Layout.read(tmp_path / "missing.json")


@pytest.mark.parametrize("change", ["truncate", "extra", "missing", "float", "list", "range"])
def test_anything_else_than_a_layout_is_refused_in_one_line(tmp_path, change):
    text = Layout.single(MIXED).to_json()
    data = json.loads(text)
    if change == "extra":
        data["speed"] = 3
    elif change == "missing":
        del data["stages"]
    elif change == "float":
        data["world_size"] = 1.0
    elif change == "range":
        data["ranks"][0]["vocab_rows"] = [0, 1, 2]
    bad = {"truncate": text[:-5], "list": "[1]"}.get(change, json.dumps(data))
    path = tmp_path / "plan.json"
    path.write_text(bad)
    with pytest.raises(UserError, match="plan.json: not a layout as `moeforge plan` writes it") as caught:
        Layout.read(path)
    assert "\n" not in str(caught.value)


def test_recompute_choices():
    config = model(layers=2)
    assert resolve_recompute(config, "none") == ()
    assert resolve_recompute(config, "all") == unit_names(config)[1:-1]
    assert resolve_recompute(config, "attention") == ("layers.0.attention", "layers.1.attention")
    assert resolve_recompute(config, ["layers.1.ffn", "layers.0.ffn"]) == ("layers.0.ffn", "layers.1.ffn")
    with pytest.raises(UserError, match=r'"layer.1.fnn": not a layer unit .*; did you mean layers.1.ffn'):
        resolve_recompute(config, ["layer.1.fnn"])
    with pytest.raises(UserError, match='model.recompute = "some": must be one of none, all, '):
        resolve_recompute(config, "some")
