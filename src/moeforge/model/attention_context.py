"""Seam 2: what a token may attend to. Dense causal with document boundaries here; caches live in serving."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionContext(Protocol):
    """Attention of one forward pass over flat tokens."""

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        """Softmax attention output [T, H, h]; `window` counts the positions a token sees, itself included."""
        ...


class DenseAttention:
    """Causal attention of B whole sequences of S positions, within documents.

    `documents_BS` (int, one id per token) keeps packed documents apart; None means one document a sequence.
    """

    def __init__(self, sequences: int, positions: int, documents_BS: Tensor | None = None) -> None:
        self.sequences, self.positions = sequences, positions
        if documents_BS is not None and bool((documents_BS == documents_BS[:, :1]).all()):
            documents_BS = None
        self._documents_BS = documents_BS
        self._bias: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [B or 1, 1, S, S], None where plain causality says it all. Made once per window."""
        if window is not None and window >= self.positions:
            window = None
        if window is None and self._documents_BS is None:
            return None
        if window not in self._bias:
            index = torch.arange(self.positions, device=like.device)
            distance = index[:, None] - index[None, :]
            allowed = (distance >= 0)[None]
            if window is not None:
                allowed = allowed & (distance < window)
            if self._documents_BS is not None:
                documents = self._documents_BS.to(like.device)
                allowed = allowed & (documents[:, :, None] == documents[:, None, :])
            bias = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
            self._bias[window] = bias.masked_fill_(~allowed, float("-inf"))[:, None]
        return self._bias[window]

    def attend(self, layer: int, q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, window: int | None) -> Tensor:
        b, s = self.sequences, self.positions
        q, k, v = (x.view(b, s, *x.shape[1:]).transpose(1, 2) for x in (q_THh, k_TGh, v_TGh))
        mask = self._mask(window, q)
        if mask is not None and q.is_cuda and q.shape[1] != k.shape[1]:
            # With a mask, torch's fused GPU kernels take no grouped queries; the one that does keeps all S x S scores.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(q_THh.shape)
