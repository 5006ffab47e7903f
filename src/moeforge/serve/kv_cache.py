"""Keys and values of one rank in pages.

Legend: T tokens, G local KV groups of a layer, h head dimension, P pages, S positions of a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeforge.config.model import ModelConfig
from moeforge.config.serving import EngineConfig
from moeforge.kernels.fp8 import E4M3, from_e4m3
from moeforge.kernels.paged_attention import write_pages


class KVCache:
    """Pages of `block_size` positions in every layer. One page number means the same positions in all layers and on all
    ranks, whatever number of KV groups each holds; so one block table serves them all.

    `kv_groups`: local groups of each layer, possibly 0. One page more than `num_blocks` is made: padding of captured
    decode steps is written there (`scratch_block`). With `fp8`, values are kept as e4m3 at scale 1, saturating at 448.
    """

    def __init__(
        self,
        kv_groups: Sequence[int],
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        fp8: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks, self.block_size, self.dtype, self.fp8 = num_blocks, block_size, dtype, fp8
        self.device = torch.device(device)
        # Zeros, because positions beyond a sequence's end are read and masked, and a masked NaN stays a NaN.
        self.layers = [
            torch.zeros(
                (2, num_blocks + 1, block_size, groups, head_dim), dtype=torch.uint8 if fp8 else dtype, device=device
            )
            for groups in kv_groups
        ]

    @property
    def scratch_block(self) -> int:
        """A page that belongs to no sequence."""
        return self.num_blocks

    def write(self, layer: int, slots_T: Tensor, k_TGh: Tensor, v_TGh: Tensor) -> None:
        """Store the keys and values of T tokens; slot = page * block_size + position in the page."""
        write_pages(self.layers[layer], slots_T, k_TGh, v_TGh)

    def read(self, layer: int, blocks_P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, S, G, h] of pages."""
        k, v = (pages.index_select(0, blocks_P) for pages in self.layers[layer])
        if self.fp8:
            return from_e4m3(k.view(E4M3), self.dtype), from_e4m3(v.view(E4M3), self.dtype)
        return k, v


def bytes_per_block(config: ModelConfig, kv_groups: Sequence[int], settings: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers of a rank with `kv_groups` groups in each layer."""
    width = 1 if settings.kv_cache_dtype == "fp8" else dtype.itemsize
    return 2 * settings.block_size * config.head_dim * sum(kv_groups) * width
