"""How much of every layer a rank holds, as plain numbers: of a layout, and of what other engines would do instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from moeforge.config.model import ModelConfig
from moeforge.layout import FFN_BLOCK, Layout
from moeforge.partition import Range, partition


@dataclass(frozen=True)
class ServingShard:
    """What one rank holds: which KV groups and feed-forward columns (of each expert) of every layer, and how many
    vocabulary rows."""

    group_ranges: tuple[Range, ...]
    column_ranges: tuple[Range, ...]
    vocab_rows: int

    @cached_property
    def kv_groups(self) -> tuple[int, ...]:
        """How many of every layer."""
        return tuple(map(_size, self.group_ranges))

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """How many of every layer."""
        return tuple(map(_size, self.column_ranges))


def shards_of(layout: Layout) -> tuple[ServingShard, ...]:
    """The shards of a layout made by `serving_layout`, in the order of ranks."""
    return tuple(
        ServingShard(
            shard.kv_groups,
            # A layer is dense or routed, and (0, 0) in the other.
            tuple((a + c, b + d) for (a, b), (c, d) in zip(shard.ffn_columns, experts.columns, strict=True)),
            _size(shard.vocab_rows),
        )
        for shard, experts in zip(layout.ranks, layout.expert_ranks, strict=True)
    )


def unrotated_shards(model: ModelConfig, tp: int, weights: Sequence[float] | None) -> tuple[ServingShard, ...]:
    """The same division in every layer: the same ranks have the extra units throughout."""
    groups = partition(model.num_kv_heads, tp, weights)[0]
    widths = {layer_width(model, layer) for layer in range(model.num_layers)}
    by_width = {width: _columns(width, tp, weights) for width in widths}
    rows = [_size(span) for span in partition(model.vocab_size, tp, weights)[0]]
    return tuple(
        ServingShard(
            (groups[rank],) * model.num_layers,
            tuple(by_width[layer_width(model, layer)][rank] for layer in range(model.num_layers)),
            rows[rank],
        )
        for rank in range(tp)
    )


def padded_shards(model: ModelConfig, tp: int) -> tuple[ServingShard, ...]:
    """Every rank alike: heads, columns and vocabulary filled up with zeros to the next multiple of `tp`."""

    def share(size: int, block: int = 1) -> int:
        return -(-size // (block * tp)) * block

    def columns(layer: int) -> int:
        width = layer_width(model, layer)
        return share(width, FFN_BLOCK if width >= FFN_BLOCK * tp else 1)

    def ranges(rank: int, sizes: Sequence[int]) -> tuple[Range, ...]:
        return tuple((rank * size, (rank + 1) * size) for size in sizes)

    groups = (share(model.num_kv_heads),) * model.num_layers
    every, rows = tuple(map(columns, range(model.num_layers))), share(model.vocab_size)
    return tuple(ServingShard(ranges(rank, groups), ranges(rank, every), rows) for rank in range(tp))


def layer_width(model: ModelConfig, layer: int) -> int:
    """Columns of a layer's feed-forward, or of each of its experts."""
    return model.moe.expert_size if model.moe is not None and model.is_moe_layer(layer) else model.ffn_size


def _columns(width: int, tp: int, weights: Sequence[float] | None) -> list[Range]:
    block = FFN_BLOCK if width >= FFN_BLOCK * tp else 1
    return [(min(b * block, width), min(e * block, width)) for b, e in partition(-(-width // block), tp, weights)[0]]


def _size(span: Range) -> int:
    return span[1] - span[0]
