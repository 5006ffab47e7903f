"""Memory for weights: parts never overlap, live as long as they are held, and no longer."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeforge.kernels import arena
from moeforge.kernels.arena import long_lived


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 40_000), min_size=2, max_size=12))
def test_parts_do_not_overlap_and_are_aligned(counts: list[int]) -> None:
    parts = [long_lived(count, torch.bfloat16) for count in counts]
    for number, part in enumerate(parts):
        part.fill_(number)
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        assert part.shape == (count,) and part.data_ptr() % 64 == 0
        assert (part == number).all()


def test_a_full_chunk_is_followed_by_another_and_large_parts_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_CHUNK", 4096)
    monkeypatch.setattr(arena, "_arena", arena._Arena())
    maps: list[int] = []

    def mapped(size: int) -> mmap.mmap:
        maps.append(size)
        return mmap.mmap(-1, size)

    monkeypatch.setattr(arena, "_mapped", mapped)
    parts = [long_lived(size, torch.uint8) for size in [1000] * 5 + [2000] + [1000] * 4]
    assert maps == [4096, 4096, 2000, 4096] and len(parts) == 10


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's count of pages")
def test_memory_is_freed_with_the_last_part() -> None:
    def resident() -> int:
        gc.collect()
        return 1024 * int(Path("/proc/self/smaps_rollup").read_text().split("Rss:")[1].split()[0])

    before = resident()
    parts = [long_lived(size << 20, torch.uint8).fill_(1) for size in (32, 32, 8, 8, 8, 8)]
    assert resident() - before > 90 << 20
    del parts
    assert resident() - before < 8 << 20


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here")
def test_pages_are_huge_where_the_system_has_them() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("huge pages are switched off")
    part = long_lived(64 << 20, torch.uint8)
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for area in areas[1:]:
        begin, end = (int(part, 16) for part in area.split()[0].split("-"))
        if begin <= part.data_ptr() < end:
            assert " hg" in area.partition("VmFlags:")[2]  # asked for; whether the system finds them is its affair
            return
    raise AssertionError("the memory is in no area")


def test_elsewhere_memory_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(arena, "_arena", arena._Arena())
    assert long_lived(10, torch.int64).fill_(3).tolist() == [3] * 10
