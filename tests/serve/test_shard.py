"""The seams of serving ranks under gloo against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import rms_norm
from moeforge.layout import Layout, serving_layout
from moeforge.model import DenseAttention
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.shard import ServingShard, add_in_order
from moeforge.serve.virtual import VirtualRanks

from .families import cut, family, logits_of, random_inputs, random_model

RunRanks = Callable[..., list[Any]]
MODELS = ("llama, tied", "llama, biases", "olmoe", "ours")
SPLITS: dict[int, tuple[float, ...]] = {2: (24, 8), 3: (1, 0, 2)}


def group_of(rank: int, size: int) -> Group:
    return Group("tp", tuple(range(size)), rank, dist.group.WORLD, Traffic(size), Watchdog())


def layout_of(name: str, size: int, uneven: bool) -> Layout:
    return serving_layout(family(name), size, SPLITS[size] if uneven else None)


def _logits(rank: int, size: int, ordered: bool) -> dict[tuple[str, bool], Tensor]:
    found = {}
    for name in MODELS:
        for uneven in (False, True):
            layout = layout_of(name, size, uneven)
            whole = random_model(family(name), torch.float64)
            shard = ServingShard(group_of(rank, size), layout, ordered)
            dispatcher = ServingDispatcher(shard, layout.expert_ranks[rank])
            part = cut(whole, layout, rank)
            inputs = random_inputs(whole.config)
            found[name, uneven] = logits_of(part, *inputs, shard=shard, dispatcher=dispatcher)
    return found


@pytest.mark.parametrize(("size", "ordered"), [(2, False), (2, True), (3, False), (3, True)])
def test_logits_are_those_of_one_process(size: int, ordered: bool, run_ranks: RunRanks) -> None:
    ranks = run_ranks(size, _logits, size, ordered)
    for name, uneven in ranks[0]:
        whole = random_model(family(name), torch.float64)
        inputs = random_inputs(whole.config)
        expected = logits_of(whole, *inputs)
        for found in ranks:
            torch.testing.assert_close(found[name, uneven], expected, rtol=1e-9, atol=1e-9)
            assert torch.equal(found[name, uneven], ranks[0][name, uneven])
        if ordered:
            layout = layout_of(name, size, uneven)
            virtual = VirtualRanks([cut(whole, layout, rank) for rank in range(size)], layout)
            with torch.inference_mode():
                found = virtual.logits(virtual.forward(*inputs, [DenseAttention(2, 9) for _ in range(size)]))
            torch.testing.assert_close(found, ranks[0][name, uneven], rtol=1e-12, atol=1e-12)


def _operations(rank: int) -> None:
    layout = serving_layout(family("llama"), 3)
    layout = replace(
        layout,
        ranks=tuple(
            replace(shard, vocab_rows=rows) for shard, rows in zip(layout.ranks, ((0, 5), (5, 5), (5, 37)), strict=True)
        ),
    )
    shard = ServingShard(group_of(rank, 3), layout, ordered=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 8, generator=generator)
    x = torch.randn(4, 8, generator=generator)
    begin, end = shard.rows_V
    tokens = torch.tensor([0, 4, 5, 36])
    assert torch.equal(shard.embed(tokens, weight[begin:end]), weight[tokens])
    assert shard.enter(x) is x
    torch.testing.assert_close(shard.logits(x, weight[begin:end]), F.linear(x, weight))
    assert shard.logits(x[:0], weight[begin:end]).shape == (0, 37)
    targets = torch.tensor([3, -100, 36, 5])
    loss = F.cross_entropy(F.linear(x, weight), targets, reduction="sum")
    torch.testing.assert_close(shard.cross_entropy(x, weight[begin:end], targets), loss)
    columns = ((0, 3), (3, 3), (3, 8))[rank]
    scale = torch.rand(8, generator=generator)
    own = shard.norm(x[:, slice(*columns)], scale[slice(*columns)], 1e-5, 8)
    torch.testing.assert_close(own, rms_norm(x, scale, 1e-5)[:, slice(*columns)])


def test_operations_with_a_rank_without_anything(run_ranks: RunRanks) -> None:
    run_ranks(3, _operations)


def _sums(rank: int) -> tuple[Tensor, Tensor]:
    shard = ServingShard(group_of(rank, 3), serving_layout(family("llama"), 3), ordered=True)
    x = torch.randn(300, 33, generator=torch.Generator().manual_seed(rank)).bfloat16()
    return shard.leave(x), torch.cat([shard.leave(row) for row in x.split([1, 2, 30, 267])])


def test_ordered_sums_do_not_depend_on_their_company(run_ranks: RunRanks) -> None:
    for together, apart in run_ranks(3, _sums):
        assert together.dtype == torch.bfloat16
        assert torch.equal(together, apart)


def test_ordered_sums_are_made_in_float32() -> None:
    parts = torch.tensor([256.0, 1.0, 1.0, -256.0]).bfloat16()[:, None]
    assert add_in_order(parts).item() == 2.0
    assert add_in_order(parts).dtype == torch.float32
    assert add_in_order(parts.double()).dtype == torch.float64


def test_one_rank_is_the_whole() -> None:
    layout = serving_layout(family("mixtral"), 1)
    whole = random_model(family("mixtral"))
    shard = ServingShard(Group("tp", (0,), 0, None, Traffic(1), Watchdog()), layout, ordered=True)
    inputs = random_inputs(whole.config)
    dispatcher = ServingDispatcher(shard, layout.expert_ranks[0])
    found = logits_of(whole, *inputs, shard=shard, dispatcher=dispatcher)
    assert torch.equal(found, logits_of(whole, *inputs))
