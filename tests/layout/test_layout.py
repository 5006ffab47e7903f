"""Layouts as data: where ranks stand, which stage is whose, and the file round trip."""

import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.errors import UserError
from moeforge.layout import Layout, build_layout


def groups(layout: Layout, *same: str) -> list[list[int]]:
    """World ranks that agree in these coordinates."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        found.setdefault(tuple(getattr(at, key) for key in same), []).append(rank)
    return list(found.values())


@settings(max_examples=60)
@given(st.data())
def test_coordinates_and_stages_are_bijections(cases, data):
    config, options = data.draw(cases)
    layout = build_layout(config, **options)
    found = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for rank, at in enumerate(found):
        assert rank == (at.pp * layout.dp + at.dp) * layout.tp + at.tp
        assert at.expert_rank == at.ep * layout.etp + at.etp
        assert at.expert_dp * layout.ep * layout.etp + at.expert_rank == at.dp * layout.tp + at.tp
    dense = product(range(layout.pp), range(layout.dp), range(layout.tp))
    assert [(at.pp, at.dp, at.tp) for at in found] == list(dense)
    routed = product(range(layout.pp), range(layout.expert_dp), range(layout.ep), range(layout.etp))
    assert [(at.pp, at.expert_dp, at.ep, at.etp) for at in found] == list(routed)

    held = [stage for rank in range(layout.pp) for stage in layout.stages_of(rank)]
    assert sorted(held) == list(range(len(layout.stages)))
    for rank in range(layout.pp):
        assert len(layout.stages_of(rank)) == layout.chunks
        assert all(layout.pp_rank_of(stage) == rank for stage in layout.stages_of(rank))
    for index, stage in enumerate(layout.stages):
        for unit in range(stage.begin_unit, stage.end_unit):
            assert layout.stage_of_unit(unit) == index


def test_presets_of_expert_parallelism(model):
    """pp 1, dp 2, tp 4: ranks 0 to 3 and 4 to 7 are the tensor-parallel groups."""
    edp = build_layout(model(), dp=2, tp=4, ep=4)
    assert edp == build_layout(model(), dp=2, tp=4)
    assert groups(edp, "expert_dp") == groups(edp, "dp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(edp, "expert_rank") == groups(edp, "tp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    ep = build_layout(model(), dp=2, tp=4, ep=8)
    assert groups(ep, "expert_dp") == [list(range(8))] and len(groups(ep, "ep")) == 8
    etp = build_layout(model(), dp=2, tp=4, ep=2, etp=4)
    assert groups(etp, "expert_dp") == [list(range(8))]
    assert groups(etp, "ep") == groups(etp, "dp") and groups(etp, "etp") == groups(etp, "tp")
    mixed = build_layout(model(), dp=2, tp=4, ep=2, etp=2)
    assert groups(mixed, "expert_dp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(mixed, "expert_dp", "ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups(mixed, "expert_rank") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_stages_of_a_rank_follow_the_schedule(model):
    config = model(layers=8)
    loop = build_layout(config, pp=3, chunks=2, schedule="interleaved-1f1b")
    assert [loop.stages_of(rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    fold = build_layout(config, pp=3, chunks=2, schedule="zbv")
    assert [fold.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert fold.pp_rank_of(5) == 0 and loop.pp_rank_of(5) == 2


@settings(max_examples=30)
@given(st.data())
def test_json_gives_an_equal_layout(cases, data):
    config, options = data.draw(cases)
    layout = build_layout(config, **options)
    assert Layout.from_json(layout.to_json()) == layout


def test_file_round_trip_and_unreadable_files(tmp_path, mixed):
    layout = build_layout(mixed, pp=2, tp=2)
    path = tmp_path / "plans" / "layout.json"
    layout.write(path)
    assert Layout.read(path) == layout
    assert [entry.name for entry in path.parent.iterdir()] == ["layout.json"]
    with pytest.raises(UserError, match=r"missing.json: cannot read the layout \(No such file"):
        Layout.read(tmp_path / "missing.json")


@pytest.mark.parametrize("change", ["truncate", "extra", "missing", "float", "list", "range", "stage", "name"])
def test_anything_else_than_a_layout_is_refused_in_one_line(tmp_path, mixed, change):
    text = Layout.single(mixed).to_json()
    data = json.loads(text)
    if change == "extra":
        data["speed"] = 3
    elif change == "missing":
        del data["stages"]
    elif change == "float":
        data["world_size"] = 1.0
    elif change == "range":
        data["ranks"][0]["vocab_rows"] = [0, 1, 2]
    elif change == "stage":
        data["stages"] = ["all"]
    elif change == "name":
        data["schedule"] = ["1f1b"]
    bad = {"truncate": text[:-5], "list": "[1]"}.get(change, json.dumps(data))
    path = tmp_path / "plan.json"
    path.write_text(bad)
    with pytest.raises(UserError, match="plan.json: not a layout as `moeforge plan` writes it") as caught:
        Layout.read(path)
    assert "\n" not in str(caught.value)
