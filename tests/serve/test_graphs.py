"""The padded step that GPUs capture, against the step that is not padded."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.serve.graphs import DecodeGraphs
from moeforge.serve.step import SequenceStep, StepBatch

from .test_runner import build, runner_of


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_padding_changes_no_sequence_and_no_page(lengths: list[int]) -> None:
    plain, padded = (runner_of(build(7, 2, True), 4) for _ in range(2))
    for cache in (plain.cache, padded.cache):
        for i, layer in enumerate(cache.layers):
            generator = torch.Generator().manual_seed(i)
            layer.copy_(torch.randn(layer.shape, generator=generator, dtype=layer.dtype))
    graphs = DecodeGraphs(padded.model, padded.cache, padded.shard, padded.dispatcher)
    pages = iter(range(200))
    begins = sorted(lengths)
    steps = [
        SequenceStep((i + 1,), begin, tuple(next(pages) % 130 for _ in range(begin // 4 + 1)), True)
        for i, begin in enumerate(begins)
    ]
    batch = StepBatch(tuple(steps))
    assert graphs.take(batch)
    with torch.inference_mode():
        torch.testing.assert_close(graphs.forward(batch), plain.forward(batch), rtol=1e-9, atol=1e-9)
        again = StepBatch(tuple(steps[:1]))  # a smaller one, then the first size once more
        torch.testing.assert_close(graphs.forward(again), plain.forward(again), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(graphs.forward(batch), plain.forward(batch), rtol=1e-9, atol=1e-9)
    for a, b in zip(plain.cache.layers, padded.cache.layers, strict=True):
        torch.testing.assert_close(a[:, :-1], b[:, :-1], rtol=1e-9, atol=1e-9)  # the last page is scratch


def test_steps_that_are_not_all_of_one_sampled_token_are_not_taken() -> None:
    runner = runner_of(build(None, 2, False), 4)
    graphs = DecodeGraphs(runner.model, runner.cache, runner.shard, runner.dispatcher)
    one = SequenceStep((1,), 3, (0,), True)
    assert graphs.take(StepBatch((one, one)))
    assert not graphs.take(StepBatch(()))
    assert not graphs.take(StepBatch((one, SequenceStep((1, 2), 0, (1,), True))))
    assert not graphs.take(StepBatch((one, SequenceStep((1,), 0, (1,), False))))
