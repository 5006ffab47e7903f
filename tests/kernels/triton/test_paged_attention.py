from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeforge.kernels.fp8 import E4M3, to_e4m3
from moeforge.kernels.paged_attention import (
    paged_attention_decode,
    paged_attention_decode_reference,
    write_pages,
)
from moeforge.kernels.triton import paged_attention
from moeforge.kernels.triton.paged_attention import SPLIT

from .compiling import ARCHITECTURES, cross_compile
from .conftest import DTYPES

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Problem:
    """Sequences of given lengths whose pages lie about, filled up in the table with one page."""

    def __init__(
        self, lengths: list[int], heads: int, groups: int, dim: int, page: int, dtype: torch.dtype, device: str
    ) -> None:
        torch.manual_seed(sum(lengths))
        most = -(-max(lengths) // page)
        need = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(need) + 1).tolist()
        self.table_BP = torch.full((len(lengths), most), order[-1])
        for row, count in enumerate(need):
            self.table_BP[row, :count] = torch.tensor([order.pop(0) for _ in range(count)])
        self.pages = torch.randn(2, sum(need) + 1, page, groups, dim).to(dtype).to(device)
        self.q = (2 * torch.randn(len(lengths), heads, dim)).to(dtype).to(device)
        self.table_BP, self.length_B = self.table_BP.to(device), torch.tensor(lengths, device=device)

    def exact(self, window: int | None) -> Tensor:
        """Sequence by sequence in float64."""
        rows = []
        for q, table, length in zip(self.q.double(), self.table_BP, self.length_B.tolist(), strict=True):
            pages = self.pages.view(E4M3).float() if self.pages.dtype == torch.uint8 else self.pages
            k, v = pages.double()[:, table].flatten(1, 2)[:, :length]
            if window is not None:
                k, v = k[-window:], v[-window:]
            k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
            score = torch.einsum("hd,shd->hs", q, k) / q.shape[1] ** 0.5
            rows.append(torch.einsum("hs,shd->hd", score.softmax(-1), v))
        return torch.stack(rows)

    def ours(self, window: int | None) -> Tensor:
        return paged_attention_decode(self.q, self.pages, self.table_BP, self.length_B, window)


SHAPES = [  # lengths, heads, groups, head dimension, positions of a page
    ([1], 1, 1, 2, 1),
    ([5, 1, 33], 4, 2, 8, 16),
    ([SPLIT, 2 * SPLIT - 1], 3, 1, 24, 32),
    ([70, 9], 20, 1, 64, 8),
    ([3, 100], 5, 5, 80, 7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 10, SPLIT + 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape: tuple, window: int | None, dtype: torch.dtype, device: str) -> None:
    problem = Problem(*shape, dtype, device)
    out = problem.ours(window)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), problem.exact(window), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_pages_of_e4m3(window: int | None, dtype: torch.dtype, device: str) -> None:
    problem = Problem([40, 1, 290], 6, 2, 24, 16, dtype, device)
    problem.pages = to_e4m3(problem.pages).view(torch.uint8)
    exact = problem.exact(window)
    torch.testing.assert_close(problem.ours(window).double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_nan_in_a_page_is_seen_by_those_who_see_the_page(device: str) -> None:
    problem = Problem([40, 30, 300], 4, 2, 8, 16, torch.float32, device)
    problem.pages = to_e4m3(problem.pages).view(torch.uint8)
    key, value = int(problem.table_BP[0, 1]), int(problem.table_BP[2, 0])
    problem.pages[0, key, 3, 1, 5] = 0x7F
    problem.pages[1, value, 0, 0, 2] = 0xFF
    for window in (None, 10):
        ours = problem.ours(window)
        assert torch.equal(ours.isnan(), problem.exact(window).isnan())
        expected = paged_attention_decode_reference(
            problem.q, problem.pages, problem.table_BP, problem.length_B, window
        )
        assert torch.equal(ours.isnan(), expected.isnan()) or window is not None  # it masks what it read


def test_what_was_never_written_is_never_read(device: str) -> None:
    problem = Problem([17, 5], 4, 2, 8, 16, torch.float32, device)
    exact = problem.exact(None)
    problem.pages[:, problem.table_BP[0, 1], 1:] = torch.nan
    problem.pages[:, problem.table_BP[1, 0], 5:] = torch.nan
    torch.testing.assert_close(problem.ours(None).double(), exact, rtol=1e-5, atol=1e-5)


def test_strided_queries_and_table(device: str) -> None:
    """As the captured decode step has them."""
    problem = Problem([40, 1, 20], 4, 2, 8, 16, torch.float32, device)
    exact = problem.exact(None)
    problem.table_BP = problem.table_BP.t().contiguous().t()
    for wide in (torch.zeros(3, 9, 8, device=device), torch.zeros(3, 9, 16, device=device)[..., ::2]):
        wide[:, 2:6] = problem.q
        problem.q = wide[:, 2:6]
        torch.testing.assert_close(problem.ours(None).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_a_row_has_the_same_bits_in_any_company(window: int | None, device: str) -> None:
    problem = Problem([2 * SPLIT + 9, 100, SPLIT], 4, 2, 8, 16, torch.float16, device)
    together = problem.ours(window)
    for row, pages in ((0, 33), (1, 7), (1, 33), (2, 16)):
        q, table, length = (x[row, None] for x in (problem.q, problem.table_BP, problem.length_B))
        alone = paged_attention_decode(q, problem.pages, table[:, :pages], length, window)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_writing(stored: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if stored == torch.uint8 else stored
    pages = torch.zeros(2, 5, 4, 3, 10, device=device).to(stored)
    fused = (300 * torch.randn(6, 3, 4, 10)).to(dtype).to(device)
    fused[1, 0, 2, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-9, -0.0])
    k, v = fused[:, :, 2], fused.transpose(2, 3)[..., 3]
    slots = torch.tensor([3, 19, 0, 7, 12, 5], device=device)
    write_pages(pages, slots, k, v)
    for side, x in zip(pages.flatten(1, 2), (k, v), strict=True):
        if stored == torch.uint8:
            side, x = side.view(E4M3).float(), to_e4m3(x).float()
        torch.testing.assert_close(side[slots], x, rtol=0, atol=0, equal_nan=True)
        rest = [slot for slot in range(20) if slot not in slots.tolist()]
        assert torch.equal(side[rest], torch.zeros_like(side[rest]))


def test_nothing(device: str) -> None:
    pages = torch.zeros(2, 3, 4, 2, 8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    write_pages(pages, none, *torch.zeros(2, 0, 2, 8, device=device))
    out = paged_attention_decode(torch.zeros(0, 4, 8, device=device), pages, none.view(0, 1), none, None)
    assert out.shape == (0, 4, 8) and not pages.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "q, stored, window, block", [("bf16", "bf16", None, 64), ("bf16", "u8", "i32", 64), ("fp32", "fp32", None, 16)]
)
def test_compiles(q: str, stored: str, window: str | None, block: int, architecture: int) -> None:
    if stored == "u8" and architecture > 86:
        stored = "fp8e4nv"
    types = {"q_ptr": f"*{q}", "k_ptr": f"*{stored}", "v_ptr": f"*{stored}", "table_ptr": "*i64", "length_ptr": "*i64"}
    types |= {"part_ptr": "*fp32", "log_ptr": "*fp32", "scale": "fp32", "splits": "i32"}
    strides = ["q_row", "q_head", "page_stride", "position_stride", "group_stride", "table_row", "table_page"]
    constants = {"PER_GROUP": 8, "DIM": 128, "PAGE": 16, "HEADS": 16, "COLUMNS": 128, "BLOCK": block, "SPLIT": SPLIT}
    (types if window else constants)["window"] = window
    cross_compile(paged_attention._attend, architecture, types | dict.fromkeys(strides, "i32"), constants, 4, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adding_up_and_writing_compile(architecture: int) -> None:
    types = {"part_ptr": "*fp32", "log_ptr": "*fp32", "length_ptr": "*i64", "out_ptr": "*bf16", "splits": "i32"}
    constants = {"window": None, "DIM": 128, "COLUMNS": 128, "SPLIT": SPLIT, "TOGETHER": 16}
    cross_compile(paged_attention._add_up, architecture, types, constants, 2)
    types = {"k_ptr": "*bf16", "v_ptr": "*bf16", "k_pages_ptr": "*u8", "v_pages_ptr": "*u8", "slot_ptr": "*i64"}
    types |= dict.fromkeys(("groups", "k_token", "k_group", "v_token", "v_group"), "i32")
    cross_compile(paged_attention._write, architecture, types, {"DIM": 128, "GROUPS": 8, "COLUMNS": 128})


@pytest.mark.cuda
def test_a_captured_step_never_waits_for_the_host() -> None:
    problem = Problem([40, 1, 290], 6, 2, 64, 16, torch.bfloat16, "cuda")
    problem.pages = to_e4m3(problem.pages).view(torch.uint8)
    k, v = torch.randn(2, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.tensor([3, 19, 40], device="cuda")

    def step() -> Tensor:
        write_pages(problem.pages, slots, k, v)
        return problem.ours(None)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    problem.length_B -= torch.tensor([7, 0, 100], device="cuda")
    k.normal_()
    graph.replay()
    assert torch.equal(captured, step())
