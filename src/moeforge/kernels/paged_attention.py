"""Attention of one new token a sequence over the pages of a KV cache, and writing to them.

Legend: B sequences, T tokens, P pages of a sequence, S positions of a page, H heads, G KV groups, h head dimension.
`pages`: keys and values [2, pages, S, G, h], contiguous, in q's dtype or e4m3 as bytes (uint8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeforge.kernels import native
from moeforge.kernels.backend import use_triton
from moeforge.kernels.fp8 import E4M3, from_e4m3, to_e4m3


def paged_attention_decode(
    q_BHh: Tensor, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int | None
) -> Tensor:
    """Softmax attention output [B, H, h] of the last of each sequence's `length_B` positions, at least 1.

    It sees them all, or the last `window` of them. table_BP int64: the pages of each sequence in order, filled up with
    any; a whole number of heads shares a KV group. No autograd. On CUDA a row's bits do not depend on other rows.
    """
    if use_triton(q_BHh):
        from moeforge.kernels.triton.paged_attention import attend

        return attend(q_BHh, pages, table_BP, length_B, window)
    if native.takes(q_BHh) and q_BHh.shape[2] % 16 == 0:
        return native.attend(q_BHh, pages, table_BP, length_B, window)
    return paged_attention_decode_reference(q_BHh, pages, table_BP, length_B, window)


def paged_attention_decode_reference(
    q_BHh: Tensor, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int | None
) -> Tensor:
    """`paged_attention_decode` over copies of the pages. The query heads of a group become query positions of its one
    key head, so no key is repeated."""
    groups, rows = pages.shape[3], len(q_BHh)
    k, v = (
        _values(side.index_select(0, table_BP.flatten()), q_BHh.dtype)
        .view(rows, -1, groups, q_BHh.shape[2])
        .transpose(1, 2)
        for side in pages
    )
    q = q_BHh.unflatten(1, (groups, -1))
    mask = decode_mask(length_B, k.shape[2], window, q.dtype).expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)


def decode_mask(length_B: Tensor, positions: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """What the last of length_B positions sees of `positions`: 0 or -inf, [B, 1, 1, S]."""
    position_S = torch.arange(positions, device=length_B.device)
    seen_BS = position_S < length_B[:, None]
    if window is not None:
        seen_BS &= position_S >= length_B[:, None] - window
    mask = torch.zeros(seen_BS.shape, dtype=dtype, device=seen_BS.device).masked_fill_(~seen_BS, -torch.inf)
    return mask[:, None, None]


def _values(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return from_e4m3(stored.view(E4M3), dtype) if stored.dtype == torch.uint8 else stored


def write_pages(pages: Tensor, slots_T: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> None:
    """Store the keys and values of T tokens; slot = page * S + position in the page, int64. As e4m3 they saturate."""
    if use_triton(k_TGh):
        from moeforge.kernels.triton.paged_attention import write

        return write(pages, slots_T, k_TGh, v_TGh)
    if native.takes(k_TGh, v_TGh, pages):
        return native.write_pages(pages, slots_T, k_TGh, v_TGh)
    for side, x in zip(pages, (k_TGh, v_TGh), strict=True):
        # torch copies no float8 by index, but bytes.
        stored = to_e4m3(x).view(torch.uint8) if side.dtype == torch.uint8 else x
        side.flatten(0, 1).index_copy_(0, slots_T, stored)
