"""The three seams carry what one process does not need: uneven tensor-parallel ranks, and a paged cache.

The implementations here are the simplest that could be right. Ranks are threads; a collective is a barrier.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.config.model import ModelConfig
from moeforge.layout import ExpertShard, Layout, build_layout
from moeforge.model import (
    DenseAttention,
    ForwardContext,
    LocalDispatcher,
    RouterRecord,
    RoutingGroups,
    Transformer,
)


class Group:
    """Ranks that meet: `exchange` gives each of them what all brought, in rank order."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=20)
        self._slots: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        everyone = list(self._slots)
        self._barrier.wait()
        return everyone

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on all ranks at once; one that fails frees the others."""

        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.ranks)]
            failures = [future.exception() for future in futures]
            for failure in failures:
                if failure is not None and not isinstance(failure, threading.BrokenBarrierError):
                    raise failure
            return [future.result() for future in futures]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rank: int) -> Tensor:
        ctx.group, ctx.rank = group, rank
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.stack(ctx.group.exchange(ctx.rank, grads[0])).sum(0), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rank: int) -> Tensor:
        return torch.stack(group.exchange(rank, x)).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


class _Join(torch.autograd.Function):
    """Columns of all ranks side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rank: int) -> Tensor:
        parts = group.exchange(rank, x)
        ctx.begin = sum(part.shape[1] for part in parts[:rank])
        ctx.width = x.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][:, ctx.begin : ctx.begin + ctx.width], None, None


class ThreadShard:
    def __init__(self, group: Group, rank: int, rows: tuple[int, int]) -> None:
        self.group, self.rank, self.rows = group, rank, rows

    def enter(self, x_TD: Tensor) -> Tensor:
        return _Enter.apply(x_TD, self.group, self.rank)

    def leave(self, x_TD: Tensor) -> Tensor:
        return _Leave.apply(x_TD, self.group, self.rank)

    def embed(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        begin, end = self.rows
        mine = (tokens_T >= begin) & (tokens_T < end)
        return self.leave(F.embedding((tokens_T - begin).where(mine, 0), weight_VD) * mine[:, None])

    def logits(self, x_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return _Join.apply(F.linear(self.enter(x_TD), weight_VD), self.group, self.rank)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x_TD, weight_VD), targets_T, reduction="sum")

    def norm(self, x_TC: Tensor, weight_C: Tensor, eps: float, width: int) -> Tensor:
        # The ranks use the sum each in its own way: what comes back is summed, too.
        squares = self.enter(self.leave(x_TC.square().sum(-1, keepdim=True)))
        return x_TC * torch.rsqrt(squares / width + eps) * weight_C

    def gather_tokens(self, *columns: Tensor) -> tuple[Tensor, ...]:
        return columns  # every rank routes all tokens

    def own_kept(self, kept_TK: Tensor | None, experts_tK: Tensor) -> Tensor | None:
        return kept_TK

    def reduce_statistics(self, x: Tensor) -> Tensor:
        return x


class ThreadDispatcher:
    """Every rank has all tokens and some whole experts (EDP within a tensor-parallel group)."""

    def __init__(self, shard: ThreadShard, held: ExpertShard) -> None:
        self.shard, self.held = shard, held

    def route(
        self,
        layer: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        kept_TK: Tensor | None,
        num_experts: int,
        experts: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        begin, end = self.held.experts[layer]
        x_TD, weights_TK = self.shard.enter(x_TD), self.shard.enter(weights_TK)
        mine = (experts_TK >= begin) & (experts_TK < end)
        if begin == end:
            # The same operations as on other ranks, on nothing: recomputation starts at the first saved
            # tensor that backward asks for, and that must lie between the same collectives everywhere.
            begin, end, experts = 0, 1, lambda rows, _: rows
        kept = mine if kept_TK is None else mine & kept_TK
        local = (experts_TK - begin).where(mine, 0)
        return self.shard.leave(LocalDispatcher().route(layer, x_TD, weights_TK, local, kept, end - begin, experts))


def expert_shard(layout: Layout, rank: int) -> ExpertShard:
    """The rank's experts; of a dense model there is only one, empty."""
    return layout.expert_ranks[rank % len(layout.expert_ranks)]


def slices(name: str, config: ModelConfig, layout: Layout, rank: int) -> dict[int, list[tuple[int, int]]]:
    """Which ranges of which dimension of a global parameter a rank holds; empty: all of it."""
    held, experts = layout.ranks[rank], expert_shard(layout, rank).experts
    if name in ("embed.weight", "head.weight"):
        return {0: [held.vocab_rows]}
    if not name.startswith("layers."):
        return {}
    layer = int(name.split(".")[1])
    h, p = config.head_dim, config.heads_per_group
    g0, g1 = held.kv_groups[layer]
    c0, c1 = held.ffn_columns[layer]
    leaf = name.split(".", 2)[2]
    return {
        "attention.qkv.weight": {0: [(g0 * (p + 2) * h, g1 * (p + 2) * h)]},
        "attention.qkv.bias": {0: [(g0 * (p + 2) * h, g1 * (p + 2) * h)]},
        "attention.o.weight": {1: [(g0 * p * h, g1 * p * h)]},
        "attention.q_norm.weight": {0: [(g0 * p * h, g1 * p * h)]} if config.qk_norm == "full" else {},
        "attention.k_norm.weight": {0: [(g0 * h, g1 * h)]} if config.qk_norm == "full" else {},
        "ffn.w13.weight": {0: [(c0, c1), (config.ffn_size + c0, config.ffn_size + c1)]},
        "ffn.w2.weight": {1: [(c0, c1)]},
        "ffn.experts.w13": {0: [experts[layer]]},
        "ffn.experts.w2": {0: [experts[layer]]},
    }.get(leaf, {})


def part_of(name: str, value: Tensor, config: ModelConfig, layout: Layout, rank: int) -> Tensor:
    for dim, ranges in slices(name, config, layout, rank).items():
        value = torch.cat([value.narrow(dim, begin, end - begin) for begin, end in ranges], dim)
    # A rank without experts in a layer holds none of their columns either.
    return value


def rank_model(whole: Transformer, layout: Layout, rank: int) -> Transformer:
    config = whole.config
    model = Transformer(config, layout, rank=rank, expert_rank=rank % len(layout.expert_ranks)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = part_of(name, whole.get_parameter(name), config, layout, rank)
            parameter.copy_(value.reshape(parameter.shape) if parameter.numel() == 0 else value)
    return model


CASES: dict[str, tuple[int, list[float] | None, dict[str, Any]]] = {
    "three KV groups on two ranks": (2, None, {"num_heads": 6, "num_kv_heads": 3, "moe": {}, "ffn_size": 48}),
    "a rank without KV groups or columns": (2, None, {"num_kv_heads": 1, "ffn_size": 1}),
    "a rank without experts": (
        3,
        None,
        {"moe": {"num_experts": 2, "gate_norm": None, "router_bias": True}, "num_kv_heads": 4},
    ),
    "unequal weights, dense and routed layers, biases": (
        2,
        [3.0, 1.0],
        {
            "num_heads": 5,
            "num_kv_heads": 5,
            "moe": {"layer_frequency": 2, "num_experts": 5, "gate_norm_learned": True},
            "ffn_size": 80,
            "qkv_bias": True,
            "output_bias": True,
            "qk_norm": "head",
            "sliding_window": 3,
        },
    ),
}


def fewer_experts(layout: Layout, shape: ModelConfig, ranks: int) -> Layout:
    """EDP with an expert each for the first ranks, and none for the others: what a hand-written plan may say."""
    count, layers = shape.moe.num_experts, shape.num_layers
    spans = [(min(rank, count), min(rank + 1, count)) for rank in range(ranks)]
    columns = ((0, shape.moe.expert_size),) * layers
    shards = tuple(ExpertShard((span,) * layers, columns) for span in spans)
    return dataclasses.replace(layout, ep=ranks, expert_ranks=shards)


def tensor_parallel(case: str, config: Callable[..., Any], build: Callable[..., Any]) -> tuple[Any, Layout, list[Any]]:
    ranks, weights, changes = CASES[case]
    shape = config(num_layers=3, **changes)
    layout = build_layout(
        shape, tp=ranks, ep=ranks if shape.moe and shape.moe.num_experts >= ranks else 1, weights=weights
    )
    if layout.ep == 1 < ranks and shape.moe is not None:  # fewer experts than ranks: the last ranks have none
        layout = fewer_experts(layout, shape, ranks)
    layout.check(shape, ranks)
    whole = build(shape)
    return whole, layout, [rank_model(whole, layout, rank) for rank in range(ranks)]


def test_the_cases_are_as_uneven_as_they_say(config: Callable[..., Any], build: Callable[..., Any]) -> None:
    def held(case: str, kind: str) -> list[list[int]]:
        _, layout, _ = tensor_parallel(case, config, build)
        shards = layout.expert_ranks if kind == "experts" else layout.ranks
        return [[end - begin for begin, end in getattr(shard, kind)] for shard in shards]

    names = list(CASES)
    assert held(names[0], "kv_groups") == [[2, 1, 2], [1, 2, 1]]
    assert 0 in held(names[1], "kv_groups")[0] + held(names[1], "kv_groups")[1]
    assert 0 in sum(held(names[1], "ffn_columns"), [])
    assert any(0 in experts for experts in held(names[2], "experts"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_uneven_tensor_parallel_ranks(
    case: str,
    drop: bool,
    recompute: bool,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    whole, layout, models = tensor_parallel(case, config, build)
    moe_layers = whole.config.moe_layers
    tokens, targets = inputs(2, 6)
    positions = torch.arange(6).repeat(2)

    def context() -> dict[str, Any]:
        if not moe_layers:
            return {}
        alpha = torch.full((len(moe_layers),), 0.5, dtype=torch.float64)
        record = RouterRecord(moe_layers, whole.config.moe.num_experts, 1, alpha, 12)
        return {"groups": RoutingGroups(2, capacity_factor=1.0, drop=drop), "record": record}

    expected_context = context()
    hidden, ctx = run(whole, tokens, **expected_context)
    expected = whole.logits(hidden, ctx)
    loss = whole.loss(hidden, targets.flatten(), ctx)
    loss.backward()

    group = Group(layout.world_size)

    def work(rank: int) -> tuple[Tensor, float, Any]:
        held = layout.ranks[rank]
        shard = ThreadShard(group, rank, held.vocab_rows)
        given = context()
        ctx = ForwardContext(DenseAttention(2, 6), ThreadDispatcher(shard, expert_shard(layout, rank)), shard, **given)
        if recompute:
            models[rank].recompute = [name for name, _ in models[rank].units() if "layers" in name]
        hidden = models[rank](tokens.flatten(), positions, ctx)
        with torch.no_grad():
            logits = models[rank].logits(hidden, ctx)
        found = models[rank].loss(hidden, targets.flatten(), ctx)
        found.backward()
        return logits, found.item(), given.get("record")

    results = group.run(work)
    for logits, found, record in results:
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-9, atol=1e-11)
        assert found == pytest.approx(loss.item(), rel=1e-11)
        if record is not None:
            torch.testing.assert_close(record.values, expected_context["record"].values, rtol=1e-9, atol=1e-11)
    for rank, model in enumerate(models):
        for name, parameter in model.named_parameters():
            gradient = part_of(name, whole.get_parameter(name).grad, whole.config, layout, rank)
            if parameter.numel():
                assert parameter.grad is not None, (rank, name)
                found = parameter.grad
                if whole.config.qk_norm == "head" and (
                    "q_norm" in name or "k_norm" in name
                ):  # one weight for all heads: each rank knows its heads' part
                    found = sum(model.get_parameter(name).grad for model in models)
                torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-11, msg=f"{rank} {name}")


class PagedAttention:
    """A cache in pages, one block table a sequence; tokens of many sequences in one flat batch."""

    def __init__(self, tables: list[Tensor], page: int) -> None:
        self.tables, self.page = tables, page
        self.pages = 1 + max(int(table.max()) for table in tables)
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}

    def place(self, sequences_T: Tensor, positions_T: Tensor) -> None:
        """Which sequence, and where in it, each token of the next forward is."""
        self.sequences, self.positions = sequences_T, positions_T

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        if layer not in self.cache:
            shape = (self.pages, self.page, *k_TGh.shape[1:])
            self.cache[layer] = k_TGh.new_full(shape, torch.nan), k_TGh.new_full(shape, torch.nan)
        where = list(zip(self.sequences.tolist(), self.positions.tolist(), strict=True))
        for t, (sequence, position) in enumerate(where):
            page = self.tables[sequence][position // self.page]
            for cache, new in zip(self.cache[layer], (k_TGh, v_TGh), strict=True):
                cache[page, position % self.page] = new[t]
        out = torch.empty_like(q_THh)
        for t, (sequence, position) in enumerate(where):
            begin = 0 if window is None else max(0, position - window + 1)
            k, v = (cache[self.tables[sequence]].flatten(0, 1)[begin : position + 1] for cache in self.cache[layer])
            per_group = q_THh.shape[1] // max(k.shape[1], 1)
            k, v = (x.repeat_interleave(per_group, 1) if per_group else x for x in (k, v))
            scores = torch.einsum("hd,shd->hs", q_THh[t], k) / q_THh.shape[2] ** 0.5
            out[t] = torch.einsum("hs,shd->hd", scores.softmax(1), v)
        return out


LENGTHS, PROMPTS, PAGE = [9, 5, 7], [4, 1, 3], 2


def decode(model: Transformer, prompts: list[Tensor], **context: Any) -> list[Tensor]:
    """Logits of every position: prompts in one flat batch, then token by token where a sequence goes on."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    tables, used = [], 0
    for length in LENGTHS:
        need = -(-length // PAGE)
        tables.append(order[used : used + need])
        used += need
    attention = PagedAttention(tables, PAGE)
    done, out = [0] * len(prompts), [[] for _ in prompts]
    with torch.no_grad():
        while any(done[i] < LENGTHS[i] for i in range(len(prompts))):
            spans = {
                i: range(done[i], PROMPTS[i] if done[i] == 0 else done[i] + 1)
                for i in range(len(prompts))
                if done[i] < LENGTHS[i]
            }
            flat = [(i, position) for i, span in spans.items() for position in span]
            sequences, positions = torch.tensor(flat).unbind(1)
            attention.place(sequences, positions)
            ctx = ForwardContext(attention, **context)
            tokens = torch.stack([prompts[i][position] for i, position in flat])
            logits = model.logits(model(tokens, positions, ctx), ctx)
            for (i, position), row in zip(flat, logits, strict=True):
                out[i].append(row)
                done[i] = position + 1
    return [torch.stack(rows) for rows in out]


@pytest.mark.parametrize("moe", [None, {}, {"layer_frequency": 2}])
@pytest.mark.parametrize("window", [None, 3])
def test_paged_decoding_equals_the_dense_forward(
    moe: dict[str, Any] | None,
    window: int | None,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    model = build(config(moe=moe, sliding_window=window))
    tokens, _ = inputs(3, 9)
    found = decode(model, list(tokens))
    for row, length, logits in zip(tokens, LENGTHS, found, strict=True):
        hidden, ctx = run(model, row[None, :length])
        torch.testing.assert_close(logits, model.logits(hidden, ctx).detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_uneven_ranks_decode_from_pages(
    case: str,
    config: Callable[..., Any],
    build: Callable[..., Any],
    inputs: Callable[..., Any],
    run: Callable[..., Any],
) -> None:
    """Both at once, as in serving: each rank's pages hold only its own KV groups, layer by layer."""
    whole, layout, models = tensor_parallel(case, config, build)
    tokens, _ = inputs(3, 9)
    group = Group(layout.world_size)

    def work(rank: int) -> list[Tensor]:
        held = layout.ranks[rank]
        shard = ThreadShard(group, rank, held.vocab_rows)
        dispatcher = ThreadDispatcher(shard, expert_shard(layout, rank))
        return decode(models[rank], list(tokens), shard=shard, dispatcher=dispatcher)

    for found in group.run(work):
        for row, length, logits in zip(tokens, LENGTHS, found, strict=True):
            hidden, ctx = run(whole, row[None, :length])
            torch.testing.assert_close(logits, whole.logits(hidden, ctx).detach(), rtol=1e-9, atol=1e-11)
