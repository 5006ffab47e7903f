"""One rank's part of the engine: its model and its pages, run for one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.model import Dispatcher, ForwardContext, Shard, Transformer
from moeforge.serve.graphs import DecodeGraphs, can_capture
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.native_steps import NativeSteps
from moeforge.serve.paged_attention import PagedAttention, TiledAttention
from moeforge.serve.step import StepBatch


class Runner:
    """Forward passes of a prepared model over a page cache. All ranks run the same steps in the same order."""

    def __init__(
        self, model: Transformer, cache: KVCache, shard: Shard, dispatcher: Dispatcher, deterministic: bool = False
    ) -> None:
        self.model, self.cache, self.shard, self.dispatcher = model, cache, shard, dispatcher
        self.deterministic = deterministic
        self._steps: DecodeGraphs | NativeSteps | None = None
        if can_capture(model.config, cache):
            self._steps = DecodeGraphs(model, cache, shard, dispatcher)
        elif not deterministic:
            self._steps = NativeSteps.of(model, cache, shard)

    @property
    def num_blocks(self) -> int:
        """Pages of the cache."""
        return self.cache.num_blocks

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, V] of the last token of each of the R sequences that sample, in their order; keys and values of
        all tokens are in the pages afterwards."""
        if self._steps is not None and self._steps.take(batch):
            return self._steps.forward(batch)
        tokens = [token for s in batch.sequences for token in s.tokens]
        positions = [position for s in batch.sequences for position in range(s.begin, s.end)]
        rows, row = [], 0
        for s in batch.sequences:
            row += len(s.tokens)
            if s.samples:
                rows.append(row - 1)
        attention = TiledAttention(self.cache, batch) if self.deterministic else PagedAttention.of(self.cache, batch)
        context = ForwardContext(attention, self.dispatcher, self.shard)
        hidden_TD = self.model(self._tensor(tokens), self._tensor(positions), context)
        if len(rows) < len(tokens):
            hidden_TD = hidden_TD[self._tensor(rows)]
        return self.model.logits(hidden_TD, context)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)
