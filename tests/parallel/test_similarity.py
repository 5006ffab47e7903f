"""Expert similarity of experts that are spread over ranks, against one process that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import ExpertShard, Layout, build_layout
from moeforge.model.units import Experts
from moeforge.parallel import Mesh
from moeforge.parallel.similarity import distributed_similarity
from moeforge.upcycle.similarity import expert_similarity

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
HIDDEN, WIDTH = 6, 7


def config_of(experts: int) -> ModelConfig:
    moe = MoEConfig(experts, 1, WIDTH, renormalize=False, layer_frequency=2)
    return ModelConfig(
        vocab_size=13, hidden_size=HIDDEN, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=2, ffn_size=20, moe=moe
    )


def without(layout: Layout, layer: int) -> Layout:
    """The last ep rank's experts of a layer, and the first etp rank's columns, given to their neighbours."""
    shards = list(layout.expert_ranks)
    for index, shard in enumerate(layout.expert_ranks):
        ep, etp = divmod(index, layout.etp)
        (begin, end), (first, last) = shard.experts[layer], shard.columns[layer]
        if layout.ep > 1 and ep >= layout.ep - 2:
            end = layout.expert_ranks[-1].experts[layer][1]
            begin = begin if ep == layout.ep - 2 else end
        if layout.etp > 1 and etp < 2:
            first, last = (0, 0) if etp == 0 else (0, last)
        experts, columns = list(shard.experts), list(shard.columns)
        experts[layer], columns[layer] = (begin, end), (first, last)
        shards[index] = ExpertShard(tuple(experts), tuple(columns))
    return replace(layout, expert_ranks=tuple(shards))


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "edp": (5, {"tp": 3}),
    "ep": (5, {"dp": 2, "tp": 2, "ep": 4}),
    "etp": (3, {"tp": 3, "ep": 1, "etp": 3}),
    "ep2 etp2": (5, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}),
    "two blocks": (4, {"dp": 2, "tp": 2, "ep": 1, "etp": 2}),
    "whole on every rank": (4, {"dp": 2, "ep": 1}),
    "a single expert": (1, {"tp": 2, "ep": 1, "etp": 2}),
}


def weights(layer: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w13 and w2 of experts that have something in common."""
    generator = torch.Generator().manual_seed(layer)
    shared = torch.randn(1, 2 * WIDTH, HIDDEN, generator=generator)
    w13 = shared + 0.7 * torch.randn(experts, 2 * WIDTH, HIDDEN, generator=generator)
    return w13.to(dtype), 3.0 * torch.randn(experts, HIDDEN, WIDTH, generator=generator).to(dtype)


def own_part(mesh: Mesh, layer: int, w13: Tensor, w2: Tensor) -> Experts:
    shard = mesh.layout.expert_ranks[mesh.at.expert_rank]
    (begin, end), (first, last) = shard.experts[layer], shard.columns[layer]
    experts = Experts(HIDDEN, end - begin, last - first).to(w13.dtype)
    with torch.no_grad():
        fused = w13[begin:end].view(end - begin, 2, WIDTH, HIDDEN)[:, :, first:last]
        experts.w13.copy_(fused.reshape(experts.w13.shape))
        experts.w2.copy_(w2[begin:end, :, first:last])
    return experts


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process_on_every_rank(name: str, empty: bool, run_ranks: RunRanks) -> None:
    count, how = LAYOUTS[name]
    config = config_of(count)
    layout = build_layout(config, **how)
    routed = config.moe_layers
    if empty:
        layout = without(layout, routed[0])
    layout.check(config, layout.world_size)

    def work(rank: int) -> list[Tensor]:
        mesh = Mesh.create(layout, CPU)
        return [
            distributed_similarity(mesh, layer, own_part(mesh, layer, *weights(layer, count, dtype)))
            for layer in routed
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        ]

    results = run_ranks(layout.world_size, work)
    dtypes = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-6}
    cases = [(layer, dtype) for layer in routed for dtype in dtypes]
    for (layer, dtype), found in zip(cases, zip(*results, strict=True), strict=True):
        wanted = expert_similarity(*weights(layer, count, dtype))
        assert all(each.dtype == torch.float64 and torch.equal(each, found[0]) for each in found)
        assert found[0].item() == pytest.approx(wanted.item(), rel=dtypes[dtype], abs=1e-12)


def test_limits(run_ranks: RunRanks) -> None:
    """Equal experts have 1; experts of zeros have a number."""
    layout = build_layout(config_of(4), tp=2)

    def work(rank: int) -> list[float]:
        mesh = Mesh.create(layout, CPU)
        layer = config_of(4).moe_layers[0]
        w13, w2 = weights(layer, 1, torch.float32)
        equal = own_part(mesh, layer, w13.expand(4, -1, -1), w2.expand(4, -1, -1))
        nothing = own_part(mesh, layer, torch.zeros(4, 2 * WIDTH, HIDDEN), torch.zeros(4, HIDDEN, WIDTH))
        return [distributed_similarity(mesh, layer, each).item() for each in (equal, nothing)]

    single = expert_similarity(torch.zeros(4, 2 * WIDTH, HIDDEN), torch.zeros(4, HIDDEN, WIDTH)).item()
    for equal, nothing in run_ranks(2, work):
        assert equal == pytest.approx(1, abs=1e-12)
        assert nothing == pytest.approx(single)
