"""Exports, read back by parsers written from what Megatron-LM and torchtitan document, not from ours."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, Stage, build_layout, unit_names
from moeforge.plan.exports import megatron_layout, torchtitan_modules


def model(layers: int = 12, **changes: object) -> ModelConfig:
    sizes = {"vocab_size": 1024, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "ffn_size": 256}
    return ModelConfig(num_layers=layers, **{**sizes, **changes})


def parse_megatron(text: str, pp: int) -> list[list[list[str]]]:
    """[rank][virtual stage] -> letters: stage number v * pp + r is the v-th of rank r, as in Megatron's 1D layout."""
    text = re.sub(r"([Etm L])\*(\d+)", lambda match: match[1] * int(match[2]), text)
    assert set(text) <= set("EtL|")
    stages = [list(stage) for stage in text.split("|")]
    assert len(stages) % pp == 0
    return [stages[rank::pp] for rank in range(pp)]


def stages_of(letters: list[list[list[str]]]) -> list[list[str]]:
    """The stages in pipeline order again."""
    return [rank[v] for v in range(len(letters[0])) for rank in letters]


def unit_slices(stages: list[list[str]]) -> list[list[str]]:
    """The units that stages of E, t and L hold, layers numbered as they come."""
    layer, found = 0, []
    for stage in stages:
        units: list[str] = []
        for letter in stage:
            if letter == "t":
                units += [f"layers.{layer}.attention", f"layers.{layer}.ffn"]
                layer += 1
            else:
                units.append({"E": "embed", "L": "head"}[letter])
        found.append(units)
    return found


def plain(layout: Layout, config: ModelConfig) -> list[list[str]]:
    names = unit_names(config)
    return [list(names[stage.begin_unit : stage.end_unit]) for stage in layout.stages]


def with_begins(layout: Layout, *begins: int, units: int) -> Layout:
    """The layout with stages that begin at these units."""
    edges = [*begins, units]
    return dataclasses.replace(layout, stages=tuple(Stage(a, b) for a, b in zip(edges, edges[1:], strict=False)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, ModelConfig]:
    pp, chunks = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 4), min_size=pp * chunks, max_size=pp * chunks))
    counts[0] += not any(counts)
    config = model(sum(counts))
    schedule = "1f1b" if chunks == 1 else "interleaved-1f1b"
    return build_layout(config, pp=pp, chunks=chunks, schedule=schedule, stages=counts), config


@given(cases())
def test_megatron_reads_the_same_stages_on_the_same_ranks(case: tuple[Layout, ModelConfig]) -> None:
    layout, config = case
    letters = parse_megatron(megatron_layout(layout, config).text, layout.pp)
    flat = [letter for stage in stages_of(letters) for letter in stage]
    assert flat == ["E", *"t" * config.num_layers, "L"]  # what validate_layer_layout asks for
    slices = unit_slices(stages_of(letters))
    assert slices == plain(layout, config)
    for rank in range(layout.pp):
        on_rank = [slices[v * layout.pp + rank] for v in range(layout.chunks)]
        assert on_rank == [plain(layout, config)[stage] for stage in layout.stages_of(rank)]


def test_megatron_layout_as_it_is_typed() -> None:
    config = model(14)
    text = megatron_layout(build_layout(config, pp=4, stages=[5, 4, 1, 4]), config).text
    assert text == "Et*5|t*4|t|t*4L"
    assert megatron_layout(build_layout(config, pp=4, stages=[14, 0, 0, 0]), config).text == "Et*14|||L"
    assert megatron_layout(build_layout(config), config).text == "Et*14L"


def test_embedding_and_head_on_stages_of_their_own() -> None:
    config = model(4)
    layout = with_begins(build_layout(config, pp=4), 0, 1, 5, 9, units=10)
    assert megatron_layout(layout, config).text == "E|t*2|t*2|L"
    assert json.loads(torchtitan_modules(layout, config).text) == [
        ["tok_embeddings"],
        ["layers.0", "layers.1"],
        ["layers.2", "layers.3"],
        ["norm", "lm_head"],
    ]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("zbv", 2)])
def test_torchtitan_builds_the_same_stages_on_the_same_ranks(schedule: str, chunks: int) -> None:
    config = model(13)
    layout = build_layout(config, pp=3, chunks=chunks, schedule=schedule)
    export = torchtitan_modules(layout, config)
    parts = json.loads(export.text)
    assert [name for part in parts for name in part] == [
        "tok_embeddings",
        *(f"layers.{layer}" for layer in range(13)),
        "norm",
        "lm_head",
    ]
    units = {"tok_embeddings": ["embed"], "norm": [], "lm_head": ["head"]}
    found = [
        [unit for name in part for unit in units.get(name, [f"{name}.attention", f"{name}.ffn"])] for part in parts
    ]
    assert found == plain(layout, config)
    count, pp = len(parts), layout.pp
    for rank in range(pp):  # torchtitan's _get_pp_rank_to_stage_indices_mapping
        theirs = (rank, count - 1 - rank) if schedule == "zbv" else tuple(range(rank, count, pp))
        assert layout.stages_of(rank) == theirs


def test_torchtitan_schedules_exist_in_torch() -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    config = model()
    for schedule, chunks in (("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 2), ("zbv", 2)):
        notes = torchtitan_modules(build_layout(config, pp=2, chunks=chunks, schedule=schedule), config).notes
        (name,) = [re.search(r'pipeline_parallel_schedule = "(\w+)"', note)[1] for note in notes if "schedule" in note]
        assert schedules.get_schedule_class(name)


EXPORTS = [megatron_layout, torchtitan_modules]


@pytest.mark.parametrize("export", EXPORTS)
def test_a_boundary_inside_a_layer_is_refused(export) -> None:
    config = model(4)
    with pytest.raises(UserError, match=r"layout stages\.1\.begin_unit = 4: between attention and feed-forward of l"):
        export(build_layout(config, pp=2, stages=[1.5, 2.5]), config)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_plan_of_another_model_is_refused(export) -> None:
    with pytest.raises(UserError, match="fingerprint"):
        export(build_layout(model(4), pp=2), model(4, ffn_size=512))


@pytest.mark.parametrize("export", EXPORTS)
def test_one_rank_cannot_have_two_stages(export) -> None:
    config = model(4)
    with pytest.raises(UserError, match=r"parallel\.pp = 1 with 2 stages"):
        export(build_layout(config, chunks=2, schedule="interleaved-1f1b"), config)


@pytest.mark.parametrize(("schedule", "chunks"), [("zero-bubble", 1), ("zero-bubble", 2), ("zbv", 2)])
def test_megatron_has_no_zero_bubble(schedule: str, chunks: int) -> None:
    config = model()
    with pytest.raises(UserError, match=f'parallel.schedule = "{schedule}": Megatron has 1f1b and interleaved-1f1b'):
        megatron_layout(build_layout(config, pp=2, chunks=chunks, schedule=schedule), config)


@pytest.mark.parametrize(("begins", "end"), [((0, 0), "embedding"), ((0, 10), "head")])
def test_megatron_wants_the_ends_on_the_end_stages(begins: tuple[int, int], end: str) -> None:
    config = model(4)
    with pytest.raises(UserError, match=f"is empty, but Megatron builds the {end} there"):
        megatron_layout(with_begins(build_layout(config, pp=2), *begins, units=10), config)


def test_torchtitan_has_no_empty_stages_and_no_tied_pipelines() -> None:
    config = model(4)
    with pytest.raises(UserError, match=r"stages\.1: is empty"):
        torchtitan_modules(build_layout(config, pp=3, stages=[2, 0, 2]), config)
    tied = model(4, tie_embeddings=True)
    with pytest.raises(UserError, match=r"tie_embeddings = true with parallel\.pp = 2"):
        torchtitan_modules(build_layout(tied, pp=2), tied)
    assert torchtitan_modules(build_layout(tied), tied)
    assert megatron_layout(build_layout(tied, pp=2), tied).text == "Et*2|t*2L"


MOE = MoEConfig(6, 2, 192)


@pytest.mark.parametrize(
    ("export", "changes", "sizes", "message"),
    [
        (megatron_layout, {"num_heads": 9, "num_kv_heads": 3}, {"tp": 2}, r"tp = 2: .* num_heads \(9\)"),
        (megatron_layout, {"num_heads": 24, "num_kv_heads": 6}, {"tp": 4}, r"tp = 4: .* num_kv_heads \(6\)"),
        (megatron_layout, {"num_heads": 6, "num_kv_heads": 3}, {"tp": 3}, r"tp = 3: .* ffn_size \(256\)"),
        (megatron_layout, {"moe": MOE}, {"tp": 4}, r"ep = 4: .* moe.num_experts \(6\)"),
        (megatron_layout, {"moe": MOE}, {"dp": 5, "ep": 1, "etp": 5}, r"etp = 5: .* moe.expert_size \(192\)"),
        (torchtitan_modules, {"num_heads": 24, "num_kv_heads": 6}, {"tp": 4}, r"tp = 4: .* num_kv_heads \(6\)"),
        (torchtitan_modules, {"num_kv_heads": 4}, {"tp": 8}, r"tp = 8: .* num_kv_heads \(4\)"),
        (torchtitan_modules, {"moe": MOE}, {"tp": 4}, r"ep = 4: .* moe.num_experts \(6\)"),
    ],
)
def test_shares_that_do_not_divide_are_refused(export, changes, sizes, message: str) -> None:
    config = model(4, **changes)
    with pytest.raises(UserError, match=message):
        export(build_layout(config, pp=2, **sizes), config)


def test_what_divides_but_is_planned_unevenly_is_noted() -> None:
    config = model(4)
    (note,) = megatron_layout(build_layout(config, pp=2, tp=2, weights=[3, 1]), config).notes
    assert "unequal KV groups, feed-forward columns; Megatron divides" in note
    assert megatron_layout(build_layout(config, pp=2, tp=2), config).notes == ()
    (note,) = megatron_layout(build_layout(config, pp=2, tp=8), config).notes  # Megatron copies the 4 KV heads
    assert "KV groups" in note


def recompute_notes(export, config: ModelConfig, **choice: object) -> list[str]:
    notes = export(build_layout(config, pp=3, stages=[4, 2, 4], **choice), config).notes
    return [note for note in notes if "recompute" in note or "checkpoint" in note]


def test_recomputation_in_megatron_is_one_number() -> None:
    config = model(10)
    assert recompute_notes(megatron_layout, config) == []
    (same,) = recompute_notes(megatron_layout, config, recompute_layers=[3, 2, 3])  # 3, or all where there are fewer
    assert same.startswith("set ") and same.endswith("--recompute-method block --recompute-num-layers 3")
    (whole,) = recompute_notes(megatron_layout, config, recompute="all")
    assert whole.startswith("set ") and whole.endswith("--recompute-num-layers 4")
    (differs,) = recompute_notes(megatron_layout, config, recompute_layers=[3, 1, 0])
    assert "[3, 1, 0]" in differs and "--recompute-num-layers 3 " in differs
    for units in ("ffn", ["layers.1.attention", "layers.1.ffn"], ["layers.0.attention"]):
        (other,) = recompute_notes(megatron_layout, config, recompute=units)
        assert "by hand" in other


def test_recomputation_in_torchtitan_is_all_or_nothing() -> None:
    config = model(10)
    assert recompute_notes(torchtitan_modules, config) == []
    assert recompute_notes(torchtitan_modules, config, recompute="all") == ["set full activation checkpointing"]
    (some,) = recompute_notes(torchtitan_modules, config, recompute_layers=[3, 1, 0])
    assert "8 of 20 layer halves" in some
