"""Keys and values of running sequences, contiguous, and the attention over them (the model's seam 2).

Legend: B sequences, T tokens, H heads, G KV groups, h head dimension, S positions held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.config.model import ModelConfig


class KVCache:
    """Rows of keys and values, one a running sequence; `lengths` counts the positions that each row holds.

    Lengths are known to the host, so that no forward pass ever waits for the device to learn a shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros, because positions beyond a row's length are read and masked, and a masked NaN stays a NaN.
        shape = (2, rows, capacity, config.num_kv_heads, config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = [0] * rows

    def prefill(self, counts: Sequence[int]) -> PrefillAttention:
        """Attention of the next forward pass over whole prompts, one after another: `counts[row]` tokens."""
        self.lengths = list(counts)
        return PrefillAttention(self)

    def decode(self) -> DecodeAttention:
        """Attention of the next forward pass over one new token of every row."""
        self.lengths = [length + 1 for length in self.lengths]
        return DecodeAttention(self)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows (ascending) go on; they become rows 0, 1, ... ."""
        for new, old in enumerate(rows):
            if new != old:
                for layer in self.layers:
                    layer[:, new, : self.lengths[old]] = layer[:, old, : self.lengths[old]]
        self.lengths = [self.lengths[row] for row in rows]


class PrefillAttention:
    """Causal attention of whole prompts, sequence by sequence: no padding, and batch mates change nothing."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._windows: dict[tuple[int, int], Tensor] = {}

    def _mask(self, count: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which keys each of `count` positions sees [S, S]; None where plain causality says it."""
        if window is None or window >= count:
            return None
        if (count, window) not in self._windows:
            band = torch.ones(count, count, dtype=torch.bool, device=device)
            self._windows[count, window] = band.tril_().triu_(1 - window)
        return self._windows[count, window]

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        """Store keys and values, return the attention output [T, H, h]."""
        out = torch.empty_like(q_THh)
        keys, values = self.cache.layers[layer]
        begin = 0
        for row, count in enumerate(self.cache.lengths):
            part = slice(begin, begin + count)
            keys[row, :count], values[row, :count] = k_TGh[part], v_TGh[part]
            q, k, v = (x[part].transpose(0, 1)[None] for x in (q_THh, k_TGh, v_TGh))
            mask = self._mask(count, window, q.device)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )
            out[part] = attended[0].transpose(0, 1)
            begin += count
        return out


class DecodeAttention:
    """Attention of one token a sequence over all that its row holds."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        device = cache.layers[0].device
        self.held = max(cache.lengths)
        self._uneven = min(cache.lengths) < self.held
        self._length_B1 = torch.tensor(cache.lengths, device=device)[:, None]
        self._rows = torch.arange(len(cache.lengths), device=device)
        self._masks: dict[int | None, Tensor | None] = {}

    def _mask(self, window: int | None) -> Tensor | None:
        """Which held positions each sequence sees [B, 1, 1, S]; None for all. Made once a window."""
        if window is not None and window >= self.held:
            window = None
        if window not in self._masks:
            mask = None
            if self._uneven or window is not None:
                position = torch.arange(self.held, device=self._rows.device)
                seen = position < self._length_B1
                if window is not None:
                    seen &= position >= self._length_B1 - window
                mask = seen[:, None, None]
            self._masks[window] = mask
        return self._masks[window]

    def attend(self, layer: int, q_BHh: Tensor, k_BGh: Tensor, v_BGh: Tensor, window: int | None) -> Tensor:
        """Store the new keys and values, return the attention output [B, H, h]."""
        keys, values = self.cache.layers[layer]
        last = self._length_B1[:, 0] - 1
        keys[self._rows, last], values[self._rows, last] = k_BGh, v_BGh
        rows = len(self.cache.lengths)
        k, v = (x[:rows, : self.held].transpose(1, 2) for x in (keys, values))
        # The query heads of a group become the query positions of its one key head: no key is repeated.
        q = q_BHh.unflatten(1, (k_BGh.shape[1], -1))
        mask = self._mask(window)
        mask = None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)
