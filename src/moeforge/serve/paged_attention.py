"""Attention of one step over pages (the model's seam 2).

Legend: T tokens, H local heads, G local KV groups, h head dimension, B sequences, P pages, S positions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels.backend import use_triton
from moeforge.kernels.paged_attention import paged_attention_decode
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.step import SequenceStep, StepBatch

_GATHERED_POSITIONS = 1 << 15


def in_triton(cache: KVCache) -> bool:
    """Whether Triton computes with activations of this cache's dtype."""
    return use_triton(cache.layers[0]) and cache.dtype != torch.float64


def most_pages(cache: KVCache) -> int:
    """Pages whose keys and values torch's attention copies out of a layer at once, padding included; other kernels copy
    none."""
    return sys.maxsize if in_triton(cache) else _GATHERED_POSITIONS // cache.block_size


@dataclass
class DecodeRows:
    """Sequences with one new token each: rows begin to end - 1 of the step; `table_BP` their pages, filled up."""

    begin: int
    end: int
    table_BP: Tensor
    length_B: Tensor


@dataclass
class _Chunk:
    """A sequence with many new tokens, the first at row `row`."""

    row: int
    step: SequenceStep
    blocks_P: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)


class PagedAttention:
    """Writes a step's keys and values into the pages and attends over them.

    `batch` has sequences of one token first, the shorter ones before the longer ones (`in_attention_order`): those of
    similar length are computed together.
    """

    def __init__(
        self, cache: KVCache, slots_T: Tensor, decodes: Sequence[DecodeRows], chunks: Sequence[_Chunk] = ()
    ) -> None:
        self.cache, self.slots_T, self.decodes, self.chunks = cache, slots_T, decodes, chunks

    @classmethod
    def of(cls, cache: KVCache, batch: StepBatch) -> PagedAttention:
        """That of a step."""
        device = cache.device
        decodes, chunks, row = [], [], 0
        for span in _similar(batch.sequences, most_pages(cache)):
            widest = len(span[-1].block_ids)
            table = [[*s.block_ids, *[s.block_ids[-1]] * (widest - len(s.block_ids))] for s in span]
            decodes.append(
                DecodeRows(
                    row,
                    row + len(span),
                    torch.tensor(table, dtype=torch.int64, device=device),
                    torch.tensor([s.end for s in span], dtype=torch.int64, device=device),
                )
            )
            row += len(span)
        for step in batch.sequences[row:]:
            chunks.append(_Chunk(row, step, torch.tensor(step.block_ids, dtype=torch.int64, device=device)))
            row += len(step.tokens)
        slots_T = torch.tensor(slots(batch, cache.block_size), dtype=torch.int64, device=device)
        return cls(cache, slots_T, decodes, chunks)

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        """Softmax attention output [T, H, h]."""
        groups = k_TGh.shape[1]
        if not groups:  # nothing of this layer is here: the other ranks hold it
            return q_THh
        self.cache.write(layer, self.slots_T, k_TGh, v_TGh)
        pages = self.cache.layers[layer]
        parts = [
            paged_attention_decode(q_THh[d.begin : d.end], pages, d.table_BP, d.length_B, window) for d in self.decodes
        ]
        for chunk in self.chunks:
            rows = slice(chunk.row, chunk.row + len(chunk.step.tokens))
            parts.append(self._chunk(chunk, layer, q_THh[rows], k_TGh[rows], v_TGh[rows], window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, c: _Chunk, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        count, end = len(c.step.tokens), c.step.end
        grouped = q.shape[1] != k.shape[1]
        mask = None
        # Rounded keys are always read back: what a token sees must not depend on how its sequence was cut into steps.
        if c.step.begin or self.cache.fp8:
            k, v = (x.flatten(0, 1)[:end] for x in self.cache.read(layer, c.blocks_P))
        if c.step.begin or (window is not None and window < end):
            if window not in c.masks:
                c.masks[window] = chunk_mask(c.step.begin, count, end, window, q)
            mask = c.masks[window]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return out[0].transpose(0, 1)


class TiledAttention:
    """`PagedAttention` with bits that do not depend on how a sequence was cut into steps, nor on other sequences.

    Queries are computed in tiles of one page's positions, counted from the sequence's beginning, over all pages up to
    that one, read back from the cache. So the shape of every matmul, and the row in it, follow from a position alone.
    """

    def __init__(self, cache: KVCache, batch: StepBatch) -> None:
        self.cache = cache
        self.slots_T = torch.tensor(slots(batch, cache.block_size), dtype=torch.int64, device=cache.device)
        self.steps = batch.sequences

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        """Softmax attention output [T, H, h]."""
        groups, size = k_TGh.shape[1], self.cache.block_size
        if not groups:
            return q_THh
        self.cache.write(layer, self.slots_T, k_TGh, v_TGh)
        out, row = torch.empty_like(q_THh), 0
        for step in self.steps:
            blocks = torch.tensor(step.block_ids, dtype=torch.int64, device=q_THh.device)
            keys, values = (x.flatten(0, 1).transpose(0, 1) for x in self.cache.read(layer, blocks))
            for first in range(step.begin // size * size, step.end, size):
                begin, end = max(first, step.begin), min(first + size, step.end)
                rows = slice(row + begin - step.begin, row + end - step.begin)
                tile = q_THh.new_zeros(size, *q_THh.shape[1:])
                tile[begin - first : end - first] = q_THh[rows]
                q = tile.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
                mask = chunk_mask(first, size, first + size, window, q).repeat(q.shape[1] // size, 1)
                k, v = keys[:, : first + size], values[:, : first + size]
                attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
                attended = attended.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2)
                out[rows] = attended[begin - first : end - first]
            row += len(step.tokens)
        return out


def in_attention_order(sequences: Sequence[SequenceStep]) -> list[int]:
    """The order of sequences that `PagedAttention` wants."""
    return sorted(range(len(sequences)), key=lambda i: (len(sequences[i].tokens) > 1, len(sequences[i].block_ids)))


def slots(batch: StepBatch, block_size: int) -> list[int]:
    """Where each token of the step is stored."""
    return [
        s.block_ids[position // block_size] * block_size + position % block_size
        for s in batch.sequences
        for position in range(s.begin, s.end)
    ]


def chunk_mask(begin: int, count: int, end: int, window: int | None, like: Tensor) -> Tensor:
    """What `count` positions from `begin` on see of `end` positions: 0 or -inf, [count, end]."""
    query_1 = torch.arange(begin, begin + count, device=like.device)[:, None]
    key_S = torch.arange(end, device=like.device)
    seen = key_S <= query_1
    if window is not None:
        seen &= key_S > query_1 - window
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _similar(sequences: Sequence[SequenceStep], pages: int) -> list[list[SequenceStep]]:
    """Spans of the sequences of one token: the longest has at most twice the pages of the shortest, and 4 more; as many
    as the longest has for each are at most `pages`, or there is but one."""
    spans: list[list[SequenceStep]] = []
    for step in sequences:
        if len(step.tokens) > 1:
            break
        widest = len(step.block_ids)
        if not spans or widest > 2 * len(spans[-1][0].block_ids) + 4 or (len(spans[-1]) + 1) * widest > pages:
            spans.append([])
        spans[-1].append(step)
    return spans
