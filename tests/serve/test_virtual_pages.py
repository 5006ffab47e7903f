"""Eight ranks with pages of their own, in one process, step for step as one rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeforge.layout import Layout, serving_layout
from moeforge.model import Transformer
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.paged_attention import PagedAttention, in_attention_order
from moeforge.serve.runner import Runner
from moeforge.serve.shard import ServingShard
from moeforge.serve.step import SequenceStep, StepBatch
from moeforge.serve.virtual import VirtualRanks

from .families import FAMILIES, cut, family, random_model

PAGES, SIZE = 40, 4
# Tokens of three sequences in each step: chunks of a prompt between others' single tokens.
STEPS = [(5, 0, 9), (4, 1, 1), (1, 6, 1), (1, 1, 1), (0, 1, 1), (1, 1, 0)]


def batches(vocab_size: int) -> list[StepBatch]:
    generator = torch.Generator().manual_seed(2)
    pages = torch.randperm(PAGES, generator=generator).view(-1, 10).tolist()
    begins = [0, 0, 0]
    made = []
    for counts in STEPS:
        sequences = []
        for i, count in enumerate(counts):
            if count:
                tokens = torch.randint(vocab_size, (count,), generator=generator).tolist()
                end = begins[i] + count
                sequences.append(SequenceStep(tuple(tokens), begins[i], tuple(pages[i][: -(-end // SIZE)]), True))
                begins[i] = end
        made.append(StepBatch(tuple(sequences[i] for i in in_attention_order(sequences))))
    return made


def cache_of(model: Transformer, layout: Layout, rank: int, dtype: torch.dtype) -> KVCache:
    groups = [end - begin for begin, end in layout.ranks[rank].kv_groups]
    return KVCache(groups, model.config.head_dim, PAGES, SIZE, dtype)


def one_rank(model: Transformer, dtype: torch.dtype, steps: Sequence[StepBatch]) -> list[Tensor]:
    layout = Layout.single(model.config)
    shard = ServingShard(Group("tp", (0,), 0, None, Traffic(1), Watchdog()), layout, False)
    dispatcher = ServingDispatcher(shard, layout.expert_ranks[0])
    runner = Runner(model, cache_of(model, layout, 0, dtype), shard, dispatcher)
    return [runner.forward(step) for step in steps]


@torch.inference_mode()
def many_ranks(whole: Transformer, tp: int, dtype: torch.dtype, steps: Sequence[StepBatch]) -> list[Tensor]:
    layout = serving_layout(whole.config, tp)
    ranks = VirtualRanks([cut(whole, layout, rank) for rank in range(tp)], layout)
    caches = [cache_of(whole, layout, rank, dtype) for rank in range(tp)]
    logits = []
    for step in steps:
        tokens = torch.tensor([token for s in step.sequences for token in s.tokens])
        positions = torch.tensor([position for s in step.sequences for position in range(s.begin, s.end)])
        hidden = ranks.forward(tokens, positions, [PagedAttention.of(cache, step) for cache in caches])
        last = torch.tensor([len(s.tokens) for s in step.sequences]).cumsum(0) - 1
        logits.append(ranks.logits(hidden[last]))
    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_eight_ranks_over_pages_step_as_one(name: str, dtype: torch.dtype) -> None:
    whole = random_model(family(name), dtype)
    steps = batches(whole.config.vocab_size)
    assert any(len(s.tokens) > 1 and s.begin for step in steps for s in step.sequences)
    found, expected = many_ranks(whole, 8, dtype, steps), one_rank(whole, dtype, steps)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
