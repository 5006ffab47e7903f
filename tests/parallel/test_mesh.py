"""Groups against the coordinates they follow from, and as processes that really meet."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import Layout, build_layout
from moeforge.parallel import Group, Mesh, Traffic, Watchdog

CPU = torch.device("cpu")
RunRanks = Callable[..., list[Any]]
GROUPS = ("world", "pp", "dp", "tp", "dp_tp", "block", "expert_dp", "tied")
MODEL = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    ffn_size=16,
    moe=MoEConfig(num_experts=8, top_k=2, expert_size=16),
)


def on_paper(layout: Layout) -> list[Mesh]:
    """Every rank's mesh, without processes."""

    def mesh(rank: int) -> Mesh:
        traffic, watchdog = Traffic(1), Watchdog()
        return Mesh(layout, rank, CPU, lambda name, ranks: Group(name, ranks, rank, None, traffic, watchdog))

    return [mesh(rank) for rank in range(layout.world_size)]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pp, dp, tp = (draw(st.integers(1, 4)) for _ in range(3))
    inside = dp * tp
    ep, etp = draw(
        st.sampled_from(
            [(e, c) for e in range(1, 9) for c in range(1, inside + 1) if inside % (e * c) == 0 and e <= inside]
        )
    )
    return build_layout(MODEL, pp=pp, dp=dp, tp=tp, ep=ep, etp=etp)


@given(layouts())
def test_every_kind_of_group_divides_the_world_and_its_members_agree(layout: Layout) -> None:
    meshes = on_paper(layout)
    sizes = {
        "world": layout.world_size,
        "pp": layout.pp,
        "dp": layout.dp,
        "tp": layout.tp,
        "dp_tp": layout.dp * layout.tp,
        "block": layout.ep * layout.etp,
        "expert_dp": layout.expert_dp,
    }
    for name in GROUPS:
        for mesh in meshes:
            group = getattr(mesh, name)
            assert group.ranks[group.index] == mesh.rank and list(group.ranks) == sorted(group.ranks)
            assert all(getattr(meshes[other], name).ranks == group.ranks for other in group.ranks)
            assert group.size == len(group.ranks) == sizes.get(name, group.size)
    for mesh in meshes:
        assert mesh.block.index == mesh.at.expert_rank
        assert mesh.block.ranks == tuple(range(mesh.block.ranks[0], mesh.block.ranks[0] + mesh.block.size))
        assert mesh.tied.size == (2 if layout.pp > 1 and mesh.at.pp in (0, layout.pp - 1) else 1)
        # who holds the same experts differs in nothing but the block
        assert {meshes[rank].at.expert_rank for rank in mesh.expert_dp.ranks} == {mesh.at.expert_rank}


def test_a_hand_drawn_mesh() -> None:
    """pp 2 x dp 2 x tp 2 under each preset, rank 6 (pp 1, dp 1, tp 0)."""

    def found(ep: int, etp: int) -> dict[str, tuple[int, ...]]:
        mesh = on_paper(build_layout(MODEL, pp=2, dp=2, tp=2, ep=ep, etp=etp))[6]
        return {name: getattr(mesh, name).ranks for name in GROUPS if name != "world"}

    fixed = {"pp": (2, 6), "dp": (4, 6), "tp": (6, 7), "dp_tp": (4, 5, 6, 7), "tied": (2, 6)}
    assert found(2, 1) == fixed | {"block": (6, 7), "expert_dp": (4, 6)}  # EDP
    assert found(4, 1) == fixed | {"block": (4, 5, 6, 7), "expert_dp": (6,)}  # EP
    assert found(2, 2) == fixed | {"block": (4, 5, 6, 7), "expert_dp": (6,)}  # ETP
    assert found(1, 1) == fixed | {"block": (6,), "expert_dp": (4, 5, 6, 7)}  # a mixture: experts nowhere spread


def test_one_process_needs_no_torch_distributed() -> None:
    mesh = Mesh.create(build_layout(MODEL), CPU)
    assert not dist.is_initialized()
    x = torch.tensor([1.0, 2.0])
    for name in GROUPS:
        group = getattr(mesh, name)
        assert (group.size, group.index, group.process_group) == (1, 0, None)
        assert group.all_reduce(x) is x
    assert mesh.traffic.sent == {}


def test_a_layout_for_another_number_of_processes_is_refused_before_any_group_is_made() -> None:
    with pytest.raises(ValueError, match="a layout of 8 ranks cannot run on 1"):
        Mesh.create(build_layout(MODEL, pp=2, dp=2, tp=2), CPU)


@pytest.mark.parametrize(
    ("sizes"),
    [
        {"pp": 2, "dp": 2, "tp": 2, "ep": 2, "etp": 2},
        {"dp": 3, "tp": 2, "ep": 3, "etp": 1},  # the block is neither tp nor dp
        {"pp": 4, "dp": 1, "tp": 2, "ep": 1, "etp": 2},
    ],
    ids=["etp", "mixture", "deep"],
)
def test_groups_meet(sizes: dict[str, int], run_ranks: RunRanks) -> None:
    """Each group sums its members' ranks, in turn and in one order everywhere; equal groups share one process group."""
    layout = build_layout(MODEL, **sizes)

    def sums(rank: int) -> tuple[list[int], bool]:
        mesh = Mesh.create(layout, CPU, 30.0)
        groups = [getattr(mesh, name) for name in GROUPS]
        shared = all(
            a.process_group is b.process_group
            for a in groups
            for b in groups
            if a.ranks == b.ranks and a.size > 1 and "pp" not in (a.name, b.name)
        )
        return [int(group.all_reduce(torch.tensor([rank])).item()) for group in groups], shared

    found = run_ranks(layout.world_size, sums)
    for mesh, (values, shared) in zip(on_paper(layout), found, strict=True):
        assert values == [sum(getattr(mesh, name).ranks) for name in GROUPS] and shared


def test_groups_made_later_meet_too(run_ranks: RunRanks) -> None:
    """A middle stage is in no `tied` group; what is made afterwards, as for saving, must still have one name."""

    def later(rank: int) -> float:
        Mesh.create(build_layout(MODEL, pp=3), CPU, 10.0)
        group = dist.new_group([0, 1, 2], timedelta(seconds=10), use_local_synchronization=True)
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        return x.item()

    assert run_ranks(3, later) == [3.0, 3.0, 3.0]


def test_pp_has_a_process_group_of_its_own(run_ranks: RunRanks) -> None:
    """Its transfers go on behind collectives, which must not find them in their way."""

    def separate(rank: int) -> bool:
        mesh = Mesh.create(build_layout(MODEL, pp=2), CPU, 30.0)
        return mesh.pp.process_group is not mesh.world.process_group

    assert run_ranks(2, separate) == [True, True]
