"""How many pages fit, and what is said where too few do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moeforge.config.serving import EngineConfig
from moeforge.errors import UserError
from moeforge.layout import Layout, serving_layout
from moeforge.serve import memory
from moeforge.serve.kv_cache import KVCache
from moeforge.serve.memory import block_count, free_bytes, require_memory, weight_bytes

from .families import FAMILIES, cut, family, random_model

CPU = torch.device("cpu")
F32 = torch.float32
PAGE = 2 * 16 * 8 * 3 * 3 * 4  # keys and values, positions, head width, groups, layers, bytes


def count(memory_bytes: int | None, layout: Layout | None = None, rank: int = 0, **settings: Any) -> int:
    config = family("llama")
    asked = EngineConfig(kv_cache_memory_bytes=memory_bytes, **settings)
    return block_count(asked, config, layout or Layout.single(config), rank, F32, CPU, 64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tp", [1, 3, 8])
def test_weight_bytes_are_those_of_the_loaded_parts(name: str, tp: int) -> None:
    whole = random_model(family(name), F32)
    layout = serving_layout(whole.config, tp)
    for rank in range(tp):
        held = sum(p.nbytes for p in cut(whole, layout, rank).state_dict().values())
        assert weight_bytes(whole.config, layout, rank, F32) == held
        assert weight_bytes(whole.config, layout, rank, torch.bfloat16) == held // 2


def test_pages_fill_the_memory_but_for_the_scratch_page() -> None:
    assert count(10 * PAGE) == 9
    assert count(11 * PAGE - 1) == 9
    assert count(10 * PAGE, kv_cache_dtype="fp8") == 39
    cache = KVCache([3, 3, 3], 8, count(10 * PAGE), 16, F32)
    assert sum(pages.nbytes for pages in cache.layers) == 10 * PAGE


def test_no_more_pages_than_all_sequences_fill() -> None:
    assert count(1 << 30) == 256 * 4
    assert count(1 << 30, max_num_seqs=3) == 12


def test_ranks_count_their_own_groups() -> None:
    layout = serving_layout(family("llama"), 2, (1, 100))
    assert all(begin == end for begin, end in layout.ranks[0].kv_groups)
    assert count(1, layout, 0) == 1024  # it needs none, so it sets no limit
    assert count(10 * PAGE, layout, 1) == 9


def test_cpu_takes_at_most_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 20 * PAGE + 5)
    assert count(None) == 9
    layout = serving_layout(family("llama"), 3)
    assert count(None, layout) == (10 * PAGE // 3) // (PAGE // 3) - 1
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 50)
    monkeypatch.setattr(memory, "CPU_KV_BYTES", 7 * PAGE)
    assert count(None) == 6


@pytest.mark.parametrize("pages", [0, 1, 4])
def test_less_than_one_sequence_is_refused_with_what_fits(pages: int) -> None:
    fits = max(pages - 1, 0) * 16
    with pytest.raises(UserError, match=f"max_model_len = 64: .* room for {fits} tokens .* 576 bytes a token"):
        count(pages * PAGE or 1)
    assert count(5 * PAGE) == 4


def test_weights_larger_than_the_memory_are_refused() -> None:
    config = family("mixtral")
    layout = serving_layout(config, 2, (3, 1))
    each = [weight_bytes(config, layout, rank, F32) for rank in range(2)]
    require_memory(config, layout, 0, F32, CPU, sum(each))  # one memory for both, however unequal their parts
    with pytest.raises(UserError, match=r"need \d\.\d\d GB in all in float32, and \d\.\d\d GB are free there"):
        require_memory(config, layout, 0, F32, CPU, sum(each) - 1)
    gpu = torch.device("cuda", 1)
    require_memory(config, layout, 1, F32, gpu, each[1])
    with pytest.raises(UserError, match="on rank 0 of 2 .* `moeforge plan serve`"):
        require_memory(config, layout, 0, F32, gpu, each[0] - 1)


def test_free_bytes_of_the_host() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
