"""The parameter table against the model itself, and every element's holders counted one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.config.quantization import Activations, QuantizationConfig, Scales
from moeforge.layout import Layout, Stage, build_layout, unit_names
from moeforge.model import Transformer
from moeforge.parallel import Group, Mesh, Traffic, Watchdog
from moeforge.parallel.mesh import tied_ranks
from moeforge.parallel.parameters import ParameterPart, boxes, chunk_of, parameter_parts
from moeforge.parallel.zero import Zero


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    moe = None
    if draw(st.booleans()):
        moe = MoEConfig(
            num_experts=draw(st.integers(3, 7)),
            top_k=2,
            expert_size=draw(st.sampled_from([5, 16, 40])),
            gate_norm=1.0,
            gate_norm_learned=draw(st.booleans()),
            router_bias=draw(st.booleans()),
            layer_frequency=draw(st.integers(1, 2)),
        )
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 23)),
        hidden_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 4)),
        num_heads=groups * per_group,
        num_kv_heads=groups,
        head_dim=2,
        ffn_size=draw(st.sampled_from([3, 16, 56])),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "head", "full"])),
        moe=moe,
    )


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, Layout]:
    """Any model over any ranks: weights with zeros, cuts inside layers, empty stages, two stages a rank."""
    config = draw(configs())
    pp, dp, tp = (draw(st.integers(1, 3)) for _ in range(3))
    experts = config.moe.num_experts if config.moe else 1
    modes = [
        (ep, etp)
        for ep in range(1, min(experts, dp * tp) + 1)
        for etp in range(1, dp * tp + 1)
        if dp * tp % (ep * etp) == 0
    ]
    ep, etp = draw(st.sampled_from(modes))
    weights = draw(st.lists(st.integers(0, 3), min_size=tp, max_size=tp).filter(any))
    layout = build_layout(config, dp=dp, tp=tp, ep=ep, etp=etp, weights=weights)
    chunks = draw(st.integers(1, 2))
    last = len(unit_names(config))
    inner = draw(st.lists(st.integers(0, last), min_size=pp * chunks - 1, max_size=pp * chunks - 1))
    begins = [0, *sorted(inner), last]
    stages = tuple(Stage(begin, end) for begin, end in zip(begins, begins[1:], strict=False))
    schedule = "1f1b" if chunks == 1 else draw(st.sampled_from(["interleaved-1f1b", "zbv"]))
    return config, replace(layout, pp=pp, world_size=pp * dp * tp, stages=stages, schedule=schedule)


def whole_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(config).named_parameters()}


def held_by(config: ModelConfig, layout: Layout, rank: int) -> dict[str, ParameterPart]:
    """What a world rank holds, on all its stages."""
    at, found = layout.coordinates(rank), dict[str, ParameterPart]()
    for stage in layout.stages_of(at.pp):
        found |= parameter_parts(config, layout, stage, at.tp, at.expert_rank)
    return found


def mesh_of(layout: Layout, rank: int) -> Mesh:
    """A rank's groups on paper, without processes."""
    traffic, watchdog = Traffic(1), Watchdog()
    return Mesh(
        layout, rank, torch.device("cpu"), lambda name, ranks: Group(name, ranks, rank, None, traffic, watchdog)
    )


@given(layouts())
def test_the_table_has_exactly_the_parameters_of_the_model(case: tuple[ModelConfig, Layout]) -> None:
    config, layout = case
    shapes = whole_shapes(config)
    for stage in range(len(layout.stages)):
        for inside in range(layout.dp * layout.tp):
            at = layout.coordinates(inside)
            with torch.device("meta"):
                model = Transformer(config, layout, stage, at.tp, at.expert_rank)
            parts = parameter_parts(config, layout, stage, at.tp, at.expert_rank)
            assert {name: part.shape for name, part in parts.items()} == {
                name: tuple(weight.shape) for name, weight in model.named_parameters()
            }
            for name, part in parts.items():
                assert part.name == name and math.prod(part.view) == shapes[name].numel()
                assert part.numel == math.prod(part.size) == math.prod(part.shape)
                bounds = zip(part.offset, part.size, part.view, strict=True)
                assert all(begin >= 0 and begin + length <= limit for begin, length, limit in bounds)


@given(layouts(), st.sampled_from(get_args(Scales)), st.booleans())
def test_fp8_matrices_have_scales_beside_them(case: tuple[ModelConfig, Layout], scales: Scales, fixed: bool) -> None:
    plain, layout = case
    activations: Activations = "static" if fixed and scales != "block128" else "none"
    kept = ("layers.0.attention.o", "layers.0.ffn.w2")
    config = replace(plain, quantization=QuantizationConfig(scales, activations, kept))
    for stage in range(len(layout.stages)):
        for inside in range(layout.dp * layout.tp):
            at = layout.coordinates(inside)
            with torch.device("meta"):
                model = Transformer(config, layout, stage, at.tp, at.expert_rank)
            parts = parameter_parts(config, layout, stage, at.tp, at.expert_rank)
            assert {name: (part.shape, part.dtype or torch.float32) for name, part in parts.items()} == {
                name: (tuple(weight.shape), weight.dtype) for name, weight in model.named_parameters()
            }
            assert set(parts) >= set(parameter_parts(plain, layout, stage, at.tp, at.expert_rank))
            assert not any(name.startswith(kept) and "scale" in name for name in parts)


@given(layouts())
def test_the_ranks_of_a_group_hold_the_same_part_and_the_groups_tile_every_parameter(
    case: tuple[ModelConfig, Layout],
) -> None:
    config, layout = case
    held = [held_by(config, layout, rank) for rank in range(layout.world_size)]
    holders = {name: torch.zeros(shape) for name, shape in whole_shapes(config).items()}
    for rank, parts in enumerate(held):
        mesh = mesh_of(layout, rank)
        for name, part in parts.items():
            group: Group = getattr(mesh, part.reduce)
            assert all(held[other][name] == part for other in group.ranks)
            if part.tied:
                assert len(mesh.tied.ranks) == 2
                assert all(held[other][name] == part for other in mesh.tied.ranks)
            one = torch.zeros_like(holders[name])
            part.place(one, torch.ones(part.shape) / (group.size * (2 if part.tied else 1)))
            holders[name] += one
    for name, count in holders.items():
        torch.testing.assert_close(count, torch.ones_like(count), msg=lambda m, name=name: f"{name}: {m}")


@given(layouts(), st.booleans())
def test_every_element_is_counted_and_saved_by_one_rank(case: tuple[ModelConfig, Layout], enabled: bool) -> None:
    config, layout = case
    owners = {name: torch.zeros(shape) for name, shape in whole_shapes(config).items()}
    for rank in range(layout.world_size):
        parts = held_by(config, layout, rank)
        zero = Zero(parts, mesh_of(layout, rank), enabled)
        for name, part in parts.items():
            begin, end = zero.owned(name)
            if zero.counts(name):
                flat = torch.zeros(part.numel)
                flat[begin:end] = 1
                one = torch.zeros_like(owners[name])
                part.place(one, flat)
                owners[name] += one
    assert all(bool((count == 1).all()) for count in owners.values())


@given(layouts())
def test_cut_and_place_are_inverse(case: tuple[ModelConfig, Layout]) -> None:
    config, layout = case
    wholes = {name: torch.arange(shape.numel()).view(shape) for name, shape in whole_shapes(config).items()}
    rebuilt = {name: torch.full_like(whole, -1) for name, whole in wholes.items()}
    for rank in range(layout.world_size):
        for name, part in held_by(config, layout, rank).items():
            local = part.cut(wholes[name])
            assert local.shape == part.shape
            part.place(rebuilt[name], local)
    assert all(torch.equal(rebuilt[name], whole) for name, whole in wholes.items())


def test_fused_gate_and_up_rows_are_cut_each() -> None:
    config = ModelConfig(11, 2, 1, 2, 2, 2, 48, moe=None)
    layout = build_layout(config, tp=3)
    whole = torch.arange(2 * 48 * 2).view(2 * 48, 2)
    part = parameter_parts(config, layout, 0, 1, 0)["layers.0.ffn.w13.weight"]
    assert layout.ranks[1].ffn_columns == ((16, 32),)
    assert torch.equal(part.cut(whole), torch.cat([whole[16:32], whole[48 + 16 : 48 + 32]]))


def test_which_group_sums_what() -> None:
    moe = MoEConfig(4, 2, 16, gate_norm=1.0, gate_norm_learned=True, router_bias=True, layer_frequency=2)
    config = ModelConfig(11, 2, 2, 2, 2, 2, 32, moe=moe, qkv_bias=True, output_bias=True, tie_embeddings=True)

    def parts(qk_norm: Any) -> dict[str, ParameterPart]:
        changed = replace(config, qk_norm=qk_norm)
        return parameter_parts(changed, build_layout(changed, tp=2), 0, 0, 0)

    by_group: dict[str, set[str]] = {}
    for name, part in parts("head").items():
        by_group.setdefault(part.reduce, set()).add(name.split(".", 2)[-1] if name[0] == "l" else name)
    assert by_group == {
        "dp": {
            "embed.weight", "attention.qkv.weight", "attention.qkv.bias", "attention.o.weight", "ffn.w13.weight",
            "ffn.w2.weight",
        },
        "dp_tp": {
            "attention.norm.weight", "attention.q_norm.weight", "attention.k_norm.weight", "attention.o.bias",
            "ffn.norm.weight", "ffn.router.weight", "ffn.router.bias", "ffn.router.scale", "head.norm.weight",
        },
        "expert_dp": {"ffn.experts.w13", "ffn.experts.w2"},
    }  # fmt: skip
    full = parts("full")["layers.0.attention.q_norm.weight"]
    assert full.reduce == "dp" and full.view == (4,) and full.size == (2,)
    assert parts("head")["layers.1.ffn.router.scale"].view == ()


def test_a_tied_embedding_has_a_copy_only_where_another_rank_runs_the_head() -> None:
    config = ModelConfig(11, 2, 2, 2, 2, 2, 32, tie_embeddings=True)
    two = build_layout(config, pp=2)
    assert parameter_parts(config, two, 0, 0, 0)["embed.weight"].tied
    assert parameter_parts(config, two, 1, 0, 0)["embed.weight"].tied
    folded = build_layout(config, pp=2, chunks=2, schedule="zbv", stages=[0.5, 0.5, 0.5, 0.5])
    assert tied_ranks(folded) == (0,)
    assert not parameter_parts(config, folded, 0, 0, 0)["embed.weight"].tied
    assert not parameter_parts(config, folded, 3, 0, 0)["embed.weight"].tied
    assert "embed.weight" not in parameter_parts(config, folded, 1, 0, 0)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.data())
def test_boxes_cover_a_flat_range_in_order_and_are_few(size: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(size)
    begin = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(begin, numel))
    flat = torch.arange(numel).view(size)
    found = list(boxes(size, begin, end))
    covered = []
    for offset, lengths in found:
        box = flat
        for dim, (start, length) in enumerate(zip(offset, lengths, strict=True)):
            box = box.narrow(dim, start, length)
        covered += box.flatten().tolist()
    assert covered == list(range(begin, end))
    assert len(found) <= max(2 * len(size) - 1, 1)


@given(st.integers(0, 50), st.integers(1, 7))
def test_chunks_follow_each_other_and_are_equal_but_for_the_last(numel: int, size: int) -> None:
    chunks = [chunk_of(numel, size, index) for index in range(size)]
    assert chunks[0][0] == 0 and chunks[-1][1] == numel
    assert all(one[1] == two[0] for one, two in zip(chunks, chunks[1:], strict=False))
    lengths = [end - begin for begin, end in chunks]
    assert max(lengths) == -(-numel // size) and lengths == sorted(lengths, reverse=True)
