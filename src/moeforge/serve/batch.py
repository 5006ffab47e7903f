"""A static batch: prompts that start together and leave one by one.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from moeforge.errors import RunError
from moeforge.model import ForwardContext, Transformer
from moeforge.serve.cache import DecodeAttention, KVCache, PrefillAttention
from moeforge.serve.request import Request
from moeforge.serve.sampling import Sampler


class StaticBatch:
    """Continues `requests`, one token each a `step()`, until none is `running`."""

    def __init__(self, model: Transformer, requests: Sequence[Request]) -> None:
        self.model, self.running = model, list(requests)
        weight = model.output_weight
        self.device = weight.device
        capacity = max(len(r.prompt_token_ids) + r.room for r in self.running)
        self.cache = KVCache(model.config, len(self.running), capacity, weight.dtype, self.device)
        self.sampler = self._new_sampler()
        self._started = False

    def _new_sampler(self) -> Sampler:
        return Sampler([request.params for request in self.running], self.device)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass: all prompts the first time, one token of every sequence afterwards."""
        inputs, attention = self._next_inputs()
        lengths = self.cache.lengths
        tokens = self._tensor([token for part in inputs for token in part])
        positions = self._tensor([p for part, n in zip(inputs, lengths, strict=True) for p in range(n - len(part), n)])
        last = self._tensor(list(accumulate(map(len, inputs)))) - 1
        context = ForwardContext(attention)
        hidden_TD = self.model(tokens, positions, context)
        logits_BV = self.model.logits(hidden_TD[last], context)
        sampled = self.sampler(logits_BV, self._tensor(lengths)).tolist()  # here alone the host waits
        for request, token in zip(self.running, sampled, strict=True):
            if token < 0:
                raise RunError("the model's logits are not finite (NaN or infinity); its weights are damaged")
            request.append(token)
        self._drop_finished()

    def _next_inputs(self) -> tuple[list[list[int]], PrefillAttention | DecodeAttention]:
        if self._started:
            return [request.token_ids[-1:] for request in self.running], self.cache.decode()
        self._started = True
        prompts = [request.prompt_token_ids for request in self.running]
        return prompts, self.cache.prefill([len(prompt) for prompt in prompts])

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _drop_finished(self) -> None:
        rows = [row for row, request in enumerate(self.running) if request.finish_reason is None]
        if len(rows) < len(self.running):
            self.running = [self.running[row] for row in rows]
            self.cache.keep(rows)
            self.sampler = self._new_sampler()
