"""Decode steps captured as CUDA graphs: launched as one, they cost the host nothing.

Legend: B sequences, P pages, R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig
from moeforge.model import Dispatcher, ForwardContext, Shard, Transformer
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.paged_attention import DecodeRows, PagedAttention, in_triton, most_pages, slots
from moeforge.serve.step import StepBatch

MOST_SEQUENCES = 256


def can_capture(config: ModelConfig, cache: KVCache) -> bool:
    """Whether decode steps of this model never wait for the host: loops over experts do, where Triton is missing."""
    return cache.device.type == "cuda" and (config.moe is None or in_triton(cache))


class DecodeGraphs:
    """One graph for each size that a step of one token a sequence is padded to, captured when it first comes.

    Sizes are powers of two, of sequences and of pages of the longest. Padding sequences read and write the scratch page
    alone. All ranks are given the same batches, so that all capture and replay the same sizes, and with them the same
    collectives. On a CPU the same padded step simply runs.
    """

    def __init__(self, model: Transformer, cache: KVCache, shard: Shard, dispatcher: Dispatcher) -> None:
        self.model, self.cache, self.shard, self.dispatcher = model, cache, shard, dispatcher
        self._captured: dict[tuple[int, int], _PaddedDecode] = {}
        # One graph runs at a time, so they may all use the same memory.
        self.pool = torch.cuda.graph_pool_handle() if cache.device.type == "cuda" else None

    def take(self, batch: StepBatch) -> bool:
        """Whether a step is one of those that are captured."""
        sequences = batch.sequences
        if not 0 < len(sequences) <= MOST_SEQUENCES or not all(s.samples and len(s.tokens) == 1 for s in sequences):
            return False
        rows, pages = self._size(batch)
        return rows * pages <= most_pages(self.cache)

    def _size(self, batch: StepBatch) -> tuple[int, int]:
        """Sequences and pages that a step is padded to."""
        pages = max(len(s.block_ids) for s in batch.sequences)
        return _power_of_two(len(batch.sequences)), _power_of_two(pages)

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, V] of a step that it takes, valid until the next one of the same size."""
        size = self._size(batch)
        if size not in self._captured:
            self._captured[size] = _PaddedDecode(*size, self)
        return self._captured[size].run(batch)


class _PaddedDecode:
    """A step of exactly `rows` sequences of `pages` pages, whose inputs are tensors that stay where they are."""

    def __init__(self, rows: int, pages: int, graphs: DecodeGraphs) -> None:
        self.rows, self.pages, self.graphs = rows, pages, graphs
        device = graphs.cache.device
        # One row each: tokens, positions, slots, lengths; then the pages. One copy brings them all.
        self.inputs = torch.zeros(4 + pages, rows, dtype=torch.int64, device=device)
        self.inputs[2] = graphs.cache.scratch_block * graphs.cache.block_size
        self.inputs[3] = 1
        self.inputs[4:] = graphs.cache.scratch_block
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # what is prepared at a first call must not be captured
                self._step()
            torch.cuda.current_stream(device).wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=graphs.pool):
                self.logits_RV = self._step()

    def run(self, batch: StepBatch) -> Tensor:
        """Logits of the sequences of `batch`."""
        cache = self.graphs.cache
        missing = self.rows - len(batch.sequences)
        scratch = cache.scratch_block
        table = [[*s.block_ids, *[s.block_ids[-1]] * (self.pages - len(s.block_ids))] for s in batch.sequences]
        columns = [
            [*(s.tokens[0] for s in batch.sequences), *[0] * missing],
            [*(s.begin for s in batch.sequences), *[0] * missing],
            [*slots(batch, cache.block_size), *[scratch * cache.block_size] * missing],
            [*(s.end for s in batch.sequences), *[1] * missing],
            *([*(row[page] for row in table), *[scratch] * missing] for page in range(self.pages)),
        ]
        self.inputs.copy_(torch.tensor(columns, dtype=torch.int64), non_blocking=True)
        if self.graph is None:
            self.logits_RV = self._step()
        else:
            self.graph.replay()
        return self.logits_RV[: len(batch.sequences)]

    def _step(self) -> Tensor:
        g = self.graphs
        tokens, positions, slots_B, length_B = self.inputs[:4]
        rows = DecodeRows(0, self.rows, self.inputs[4:].t(), length_B)
        context = ForwardContext(PagedAttention(g.cache, slots_B, [rows]), g.dispatcher, g.shard)
        return g.model.logits(g.model(tokens, positions, context), context)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
