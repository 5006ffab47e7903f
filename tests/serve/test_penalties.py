"""Penalties against a count of all tokens anew."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeforge.serve.outputs import Sampled
from moeforge.serve.penalties import Penalties
from moeforge.serve.request import Request
from moeforge.serve.sampling_params import SamplingParams

V = 12
PARAMS = (
    SamplingParams(repetition_penalty=1.7, max_tokens=None),
    SamplingParams(frequency_penalty=0.5, max_tokens=None),
    SamplingParams(presence_penalty=-1.5, max_tokens=None),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=-0.3, presence_penalty=0.9, max_tokens=None),
)


def expected(logits: torch.Tensor, request: Request) -> list[float]:
    params, counts = request.params, Counter(request.output_token_ids)
    row = []
    for token, value in enumerate(logits.tolist()):
        if token in request.all_token_ids:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (token in counts)
        row.append(value)
    return row


@given(st.data())
def test_requests_that_come_and_go(data: st.DataObject) -> None:
    pool = [
        Request(str(i), None, data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6)), params, 99)
        for i, params in enumerate(PARAMS)
    ]
    penalties = Penalties(V, torch.device("cpu"))
    batch: list[Request] = []
    for step in range(8):
        if step == 0 or data.draw(st.booleans()):
            batch = data.draw(st.lists(st.sampled_from(pool), max_size=4, unique=True))
            penalties.follow(list(batch))
        if not batch:
            continue
        logits = torch.randn(len(batch), V, generator=torch.Generator().manual_seed(step))
        changed = logits.clone()
        penalties.apply(changed)
        rows = [expected(row, request) for row, request in zip(logits, batch, strict=True)]
        torch.testing.assert_close(changed, torch.tensor(rows))
        for request in batch:
            request.append(Sampled(data.draw(st.integers(0, V - 1))))
