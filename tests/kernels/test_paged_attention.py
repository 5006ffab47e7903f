from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels.fp8 import E4M3, to_e4m3
from moeforge.kernels.paged_attention import decode_mask, paged_attention_decode, write_pages


def scattered(lengths: list[int], page: int, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages, table and lengths of sequences whose pages lie about; the table is filled up with page 0."""
    torch.manual_seed(0)
    need = [-(-length // page) for length in lengths]
    order = (1 + torch.randperm(sum(need))).split(need)
    table_BP = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    pages = torch.randn(2, 1 + sum(need), page, groups, dim, dtype=torch.float64)
    return pages, table_BP, torch.tensor(lengths)


def by_hand(q_BHh: Tensor, pages: Tensor, table_BP: Tensor, length_B: Tensor, window: int | None) -> Tensor:
    """One head of one sequence at a time."""
    out = torch.empty_like(q_BHh)
    each = q_BHh.shape[1] // pages.shape[3]
    for b, length in enumerate(length_B.tolist()):
        first = 0 if window is None else max(0, length - window)
        for head in range(q_BHh.shape[1]):
            k, v = pages[:, table_BP[b], :, head // each].flatten(1, 2)[:, first:length]
            out[b, head] = torch.softmax(k @ q_BHh[b, head] / q_BHh.shape[2] ** 0.5, 0) @ v
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("heads, groups", [(1, 1), (6, 2), (3, 3)])
def test_equals_attention_by_hand(heads: int, groups: int, window: int | None) -> None:
    pages, table_BP, length_B = scattered([7, 1, 16, 9], 4, groups, 6)
    q = torch.randn(4, heads, 6, dtype=torch.float64)
    out = paged_attention_decode(q, pages, table_BP, length_B, window)
    torch.testing.assert_close(out, by_hand(q, pages, table_BP, length_B, window), rtol=1e-10, atol=1e-12)


def test_pages_of_e4m3_are_read_as_what_they_mean() -> None:
    pages, table_BP, length_B = scattered([7, 12], 4, 2, 6)
    stored = to_e4m3(pages)
    q = torch.randn(2, 4, 6, dtype=torch.float64)
    out = paged_attention_decode(q, stored.view(torch.uint8), table_BP, length_B, None)
    expected = by_hand(q, stored.double(), table_BP, length_B, None)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.uint8])
def test_written_tokens_are_in_their_slots_and_nothing_else_changes(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    pages = torch.zeros(2, 3, 4, 2, 5).to(stored)
    k, v = 300 * torch.randn(2, 3, 2, 5)
    k[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -1e-9])
    slots = torch.tensor([9, 0, 6])
    write_pages(pages, slots, k, v)
    for side, x in zip(pages.flatten(1, 2), (k, v), strict=True):
        if stored == torch.uint8:
            side, x = side.view(E4M3).float(), to_e4m3(x).float()
        torch.testing.assert_close(side[slots], x, rtol=0, atol=0, equal_nan=True)
        side[slots] = 0
        assert not side.any()


def test_mask_of_a_window() -> None:
    mask = decode_mask(torch.tensor([1, 4]), 5, 2, torch.float32)[:, 0, 0]
    assert mask.isinf().tolist() == [[False, True, True, True, True], [True, True, False, False, True]]
