"""Attention of one new token a sequence over pages, split over the positions (flash-decoding, Dao et al. 2023).

A split is `SPLIT` positions counted from the sequence's beginning and is computed alone; a second kernel adds up a
sequence's splits in their order. So a row's bits follow from its own positions, whatever comes with it.

Legend: B sequences, P pages, S positions of a page, H heads, G KV groups, h head dimension.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeforge.kernels.fp8 import E4M3
from moeforge.kernels.triton.fp8_convert import as_argument, e4m3_to, to_e4m3_bytes

SPLIT = 256
_TOGETHER = 16
"""Splits that are added up at once."""


@triton.jit
def _first(length, window):
    """The first position that the last of `length` sees."""
    return 0 if window is None else tl.maximum(length - window, 0)


@triton.jit(do_not_specialize=["splits"])
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, log_ptr, scale, window, splits,
    q_row, q_head, page_stride, position_stride, group_stride, table_row, table_page,
    PER_GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, group, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_ptr + b).to(tl.int32)
    first = _first(length, window)
    begin = tl.maximum(split * SPLIT, first // BLOCK * BLOCK)
    end = tl.minimum((split + 1) * SPLIT, length)
    if begin >= end:
        return
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    inside = (head < PER_GROUP)[:, None] & (column < DIM)[None, :]
    heads = group * PER_GROUP + head[:, None]
    q = tl.load(q_ptr + b * q_row + heads * q_head + column[None, :], inside, other=0.0)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, COLUMNS), tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        seen = (position >= first) & (position < end)
        page = tl.load(table_ptr + b * table_row + position // PAGE * table_page, seen, other=0).to(tl.int64)
        at = page * page_stride + position % PAGE * position_stride + group * group_stride
        at, read = at[:, None] + column[None, :], seen[:, None] & (column < DIM)[None, :]
        k = e4m3_to(tl.load(k_ptr + at, read, other=0.0), q.dtype)
        v = e4m3_to(tl.load(v_ptr + at, read, other=0.0), q.dtype)
        score = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, 1)
        out = tl.dot(weight.to(q.dtype), v, out * keep[:, None], input_precision="ieee")
        top = higher
    at = ((b * tl.num_programs(1) + group) * PER_GROUP + head) * splits + split
    tl.store(part_ptr + at[:, None] * DIM + column[None, :], out / total[:, None], inside)
    tl.store(log_ptr + at, top + tl.log2(total), head < PER_GROUP)


@triton.jit(do_not_specialize=["splits"])
def _add_up(
    part_ptr, log_ptr, length_ptr, out_ptr, window, splits,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = b * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(length_ptr + b).to(tl.int32)
    first, end = _first(length, window) // SPLIT, tl.cdiv(length, SPLIT)
    column = tl.arange(0, COLUMNS)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    out = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first // TOGETHER * TOGETHER, end, TOGETHER):
        split = start + tl.arange(0, TOGETHER)
        seen = (split >= first) & (split < end)
        log = tl.load(log_ptr + row * splits + split, seen, other=float("-inf"))
        at = (row * splits + split)[:, None] * DIM + column[None, :]
        part = tl.load(part_ptr + at, seen[:, None] & (column < DIM)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(log, 0))
        weight = tl.exp2(log - higher)
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, 0)
        out = out * keep + tl.sum(part * weight[:, None], 0)
        top = higher
    tl.store(out_ptr + row * DIM + column, out / total, column < DIM)


@triton.jit
def _write(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, slot_ptr, groups, k_token, k_group, v_token, v_group,
    DIM: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (group < groups) & (column < DIM)
    to = tl.load(slot_ptr + token) * groups * DIM + group * DIM + column
    k = tl.load(k_ptr + token * k_token + group * k_group + column, inside)
    v = tl.load(v_ptr + token * v_token + group * v_group + column, inside)
    if k_pages_ptr.dtype.element_ty == tl.uint8:
        k, v = to_e4m3_bytes(k.to(tl.float32)), to_e4m3_bytes(v.to(tl.float32))
    tl.store(k_pages_ptr + to, k, inside)
    tl.store(v_pages_ptr + to, v, inside)


def attend(q_BHh: Tensor, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int | None) -> Tensor:
    """`moeforge.kernels.paged_attention_decode` in two launches; pages contiguous."""
    rows, heads, dim = q_BHh.shape
    _, _, size, groups, _ = pages.shape
    out = q_BHh.new_empty(q_BHh.shape)
    if not out.numel():
        return out
    q = q_BHh if q_BHh.stride(2) == 1 else q_BHh.contiguous()
    k, v = as_argument(pages.view(E4M3)) if pages.dtype == torch.uint8 else pages
    splits = triton.cdiv(table_BP.shape[1] * size, SPLIT)
    part = q.new_empty(rows, heads, splits, dim, dtype=torch.float32)
    log = q.new_empty(rows, heads, splits, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(dim))
    _attend[(rows, groups, splits)](
        q, k, v, table_BP, length_B, part, log, math.log2(math.e) / math.sqrt(dim), window, splits,
        q.stride(0), q.stride(1), *k.stride()[:3], *table_BP.stride(),
        heads // groups, dim, size, max(16, triton.next_power_of_2(heads // groups)), width, _block(width, q), SPLIT,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    _add_up[(rows, heads)](part, log, length_B, out, window, splits, dim, width, SPLIT, _TOGETHER, num_warps=2)
    return out


def _block(width: int, like: Tensor) -> int:
    """Positions whose keys, or values, are in registers at once; of float32 fewer, as no matrix unit takes it whole."""
    return max(16, min(64, (1 << 15) // (width * like.element_size() ** 2)))


def write(pages: Tensor, slots_T: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> None:
    """`moeforge.kernels.write_pages` in one launch; pages contiguous."""
    tokens, groups, dim = k_TGh.shape
    if k_TGh.numel():
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_TGh, v_TGh))
        _write[(tokens,)](
            k, v, *pages, slots_T, groups, *k.stride()[:2], *v.stride()[:2],
            dim, triton.next_power_of_2(groups), triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
