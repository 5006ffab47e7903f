"""Steps over pages, however a sequence is cut into them, against whole sequences through the same model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeforge.config.model import ModelConfig, MoEConfig
from moeforge.layout import Layout
from moeforge.model import DenseAttention, ForwardContext, Transformer
from moeforge.parallel import Group, Traffic, Watchdog
from moeforge.serve.dispatcher import ServingDispatcher
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.paged_attention import in_attention_order
from moeforge.serve.runner import Runner
from moeforge.serve.shard import ServingShard
from moeforge.serve.step import SequenceStep, StepBatch

PAGES = 130


def build(window: int | None, kv_heads: int, moe: bool, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=70,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=8,
        ffn_size=48,
        sliding_window=window,
        sliding_window_first_layer=1,
        moe=MoEConfig(num_experts=4, top_k=2, expert_size=24, gate_norm=1.0) if moe else None,
    )
    model = Transformer(config)
    model.reset_parameters(std=0.3)
    return model.to(dtype)


def runner_of(model: Transformer, block_size: int, fp8: bool = False, deterministic: bool = False) -> Runner:
    dtype = next(model.parameters()).dtype
    groups = [model.config.num_kv_heads] * model.config.num_layers
    cache = KVCache(groups, model.config.head_dim, PAGES, block_size, dtype, fp8)
    for layer in cache.layers:  # what lies there from before must not matter
        layer.copy_(torch.randint(0, 100, layer.shape))
    layout = Layout.single(model.config)
    shard = ServingShard(single_group(), layout, deterministic)
    dispatcher = ServingDispatcher(shard, layout.expert_ranks[0])
    return Runner(model.prepare(64, deterministic), cache, shard, dispatcher, deterministic)


def single_group() -> Group:
    """Of one process."""
    return Group("tp", (0,), 0, None, Traffic(1), Watchdog())


@torch.inference_mode()
def whole(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of one sequence without pages."""
    context = ForwardContext(DenseAttention(1, len(tokens)))
    return model.logits(model(tokens, torch.arange(len(tokens)), context), context)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3, 7])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_into_steps_equals_the_whole(window: int | None, kv_heads: int, moe: bool, data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([1, 4, 16]))
    texts, cuts = draw_texts(data)
    expected = build(window, kv_heads, moe)
    runner = runner_of(build(window, kv_heads, moe), block_size)
    seen = 0
    for text, logits in run(runner, texts, cuts, block_size):
        torch.testing.assert_close(logits, whole(expected, torch.tensor(text))[-1], rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen == sum(map(len, cuts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_deterministic_bits_do_not_depend_on_cuts_or_company(dtype: torch.dtype, data: st.DataObject) -> None:
    texts, cuts = draw_texts(data)
    together = runner_of(build(None, 2, True, dtype), 4, deterministic=True)
    alone = runner_of(build(None, 2, True, dtype), 4, deterministic=True)
    for text, logits in run(together, texts, cuts, 4):
        ((_, expected),) = run(alone, [list(text)], [[len(text)]], 4)
        assert torch.equal(logits, expected)


def draw_texts(data: st.DataObject) -> tuple[list[list[int]], list[list[int]]]:
    """Up to four sequences, and the positions at which each is cut, its end last."""
    count = data.draw(st.integers(1, 4))
    texts = [
        [i, *data.draw(st.lists(st.integers(4, 69), min_size=1, max_size=data.draw(st.sampled_from([2, 8, 30]))))]
        for i in range(count)
    ]
    cuts = [[*sorted(data.draw(st.sets(st.integers(1, len(t) - 1), max_size=5))), len(t)] for t in texts]
    return texts, cuts


def run(
    runner: Runner, texts: list[list[int]], cuts: list[list[int]], block_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(what was known, logits) of every sequence at every cut."""
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(len(texts[0]))).tolist()
    pages = [[order.pop() for _ in range(-(-len(text) // block_size))] for text in texts]
    begins = [0] * len(texts)
    for n in range(max(map(len, cuts))):
        going = [i for i, cut in enumerate(cuts) if n < len(cut)]
        steps = [
            SequenceStep(
                tuple(texts[i][begins[i] : cuts[i][n]]),
                begins[i],
                tuple(pages[i][: -(-cuts[i][n] // block_size)]),
                samples=True,
            )
            for i in going
        ]
        places = in_attention_order(steps)
        logits = runner.forward(StepBatch(tuple(steps[place] for place in places)))
        for place, row in zip(places, logits, strict=True):
            yield texts[going[place]][: cuts[going[place]][n]], row
        for i in going:
            begins[i] = cuts[i][n]


def test_only_rows_that_sample_have_logits() -> None:
    runner = runner_of(build(None, 2, False), 4)
    wanted = ((5,), 3, True), ((6, 7), 1, False), ((6, 8), 2, True)
    steps = [SequenceStep(tokens, 0, (page,), samples) for tokens, page, samples in wanted]
    assert runner.forward(StepBatch(tuple(steps))).shape == (2, 70)


def test_fp8_pages_are_close_and_saturate() -> None:
    exact, small = (runner_of(build(None, 2, False, torch.float32), 4, fp8=fp8) for fp8 in (False, True))
    text, cut = [[1, *range(9, 29)]], [[10, 11, 12, 21]]
    for (_, a), (_, b) in zip(run(exact, text, cut, 4), run(small, text, cut, 4), strict=True):
        assert torch.cosine_similarity(a, b, dim=0) > 0.98
    cache = small.cache
    cache.write(0, torch.tensor([5]), torch.full((1, 2, 8), 1e6), torch.full((1, 2, 8), -1e6))
    k, v = cache.read(0, torch.tensor([1]))
    assert k[0, 1].eq(448).all() and v[0, 1].eq(-448).all()
    assert cache.layers[0].element_size() == 1


def test_fp8_pages_give_the_same_however_a_prompt_is_cut() -> None:
    text = [1, *range(9, 29)]
    at_once = runner_of(build(None, 2, True, torch.float32), 4, fp8=True)
    ((_, expected),) = run(at_once, [text], [[21]], 4)
    for cuts in ([4, 21], [7, 13, 21], [20, 21]):
        in_pieces = runner_of(build(None, 2, True, torch.float32), 4, fp8=True)
        *_, (_, logits) = run(in_pieces, [text], [cuts], 4)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_steps_travel_as_integers() -> None:
    batch = StepBatch((SequenceStep((5, 6, 7), 2, (3, 9), True), SequenceStep((1,), 0, (4,), False)))
    assert StepBatch.decode(batch.encode()) == batch
    assert StepBatch.decode(StepBatch(()).encode()) == StepBatch(())
