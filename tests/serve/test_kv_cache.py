"""Pages hold what is written, where it is written."""

from __future__ import annotations

import pytest
import torch

from moeforge.config.serving import EngineConfig
from moeforge.serve.kv_cache import KVCache, bytes_per_block

from .families import family


def keys(count: int, groups: int, seed: int) -> torch.Tensor:
    return torch.randn(count, groups, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_give_back_what_was_written(dtype: torch.dtype) -> None:
    cache = KVCache([2, 1], 4, 3, 2, dtype)
    k, v = keys(3, 2, 0).to(dtype), keys(3, 2, 1).to(dtype)
    cache.write(0, torch.tensor([5, 0, 2]), k, v)  # page 2 position 1, page 0 position 0, page 1 position 0
    for found, given in zip(cache.read(0, torch.tensor([2, 0, 1])), (k, v), strict=True):
        assert found.shape == (3, 2, 2, 4) and found.dtype == dtype
        assert torch.equal(found[0, 1], given[0])
        assert torch.equal(found[1, 0], given[1])
        assert torch.equal(found[2, 0], given[2])
        assert not found[0, 0].any() and not found[1, 1].any()
    assert not cache.layers[1].any()
    cache.write(0, torch.tensor([5]), k[2:], v[2:])
    assert torch.equal(cache.read(0, torch.tensor([2]))[1][0, 1], v[2])


def test_the_scratch_page_is_no_sequences(dtype: torch.dtype = torch.float32) -> None:
    cache = KVCache([1], 4, 3, 2, dtype)
    assert cache.scratch_block == 3 and cache.num_blocks == 3
    cache.write(0, torch.tensor([6, 7]), keys(2, 1, 0), keys(2, 1, 1))
    assert not cache.read(0, torch.tensor([0, 1, 2]))[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_pages_round_once_and_saturate(dtype: torch.dtype) -> None:
    cache = KVCache([1], 4, 2, 2, dtype, fp8=True)
    x = torch.tensor([[[0.0, 1.125, -1e6, 447.0]], [[1.06, 3e-3, float("inf"), -0.5]]], dtype=dtype)
    cache.write(0, torch.tensor([0, 1]), x, -x)
    k, v = cache.read(0, torch.tensor([0]))
    assert k.dtype == dtype and cache.layers[0].dtype == torch.uint8
    assert k[0, 0, 0].tolist() == [0, 1.125, -448, 448]
    assert k[0, 1, 0, 2] == 448 and k[0, 1, 0, 3] == -0.5
    assert abs(k[0, 1, 0, 0] - 1.06) < 0.07
    assert torch.equal(v, -k)
    cache.write(0, torch.tensor([2, 3]), k[0], v[0])  # what has been rounded stays
    assert torch.equal(cache.read(0, torch.tensor([1]))[0], k)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("groups", [[3, 3, 3], [1, 0, 2]])
def test_bytes_per_block_are_those_of_a_page(kv_cache_dtype: str, groups: list[int]) -> None:
    settings = EngineConfig(kv_cache_dtype=kv_cache_dtype, block_size=4)  # type: ignore[arg-type]
    caches = [KVCache(groups, 8, n, 4, torch.bfloat16, kv_cache_dtype == "fp8") for n in (5, 6)]
    small, large = (sum(pages.nbytes for pages in cache.layers) for cache in caches)
    assert bytes_per_block(family("llama"), groups, settings, torch.bfloat16) == large - small
