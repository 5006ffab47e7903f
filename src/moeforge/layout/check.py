"""Whether a layout fits its model and its processes: what a hand-written or stale plan can get wrong."""

from __future__ import annotations

from collections.abc import Sequence

from moeforge.errors import UserError
from moeforge.layout.layout import Layout
from moeforge.layout.schedule import require_schedule
from moeforge.layout.shape import ModelShape
from moeforge.layout.units import ENDS, unit_names
from moeforge.partition import Range


def check_layout(layout: Layout, config: ModelShape, world_size: int) -> None:
    """Raises UserError unless `layout` is for this model and `world_size`, and covers all of it."""
    if layout.fingerprint != config.fingerprint():
        raise UserError(
            f"layout fingerprint = {layout.fingerprint}: the plan was made for another model (this one is "
            f"{config.fingerprint()}); plan again"
        )
    if layout.world_size != world_size:
        raise UserError(
            f"layout world_size = {layout.world_size}: the plan needs {layout.world_size} processes, "
            f"but {world_size} run; plan again"
        )
    _check_sizes(layout)
    _check_stages(layout, config)
    _check_cover("vocab_rows", [shard.vocab_rows for shard in layout.ranks], config.vocab_size)
    for what, shards, keys in (
        ("ranks", layout.ranks, ("kv_groups", "ffn_columns")),
        ("expert_ranks", layout.expert_ranks, ("experts", "columns")),
    ):
        for index, shard in enumerate(shards):
            for key in keys:
                if (count := len(getattr(shard, key))) != config.num_layers:
                    raise UserError(
                        f"layout {what}.{index}.{key}: has {count} ranges, must have one for each of the "
                        f"{config.num_layers} layers"
                    )
    for layer in range(config.num_layers):
        _check_layer(layout, config, layer)


def _check_sizes(layout: Layout) -> None:
    for key in ("pp", "dp", "ep", "etp"):
        if getattr(layout, key) < 1:
            raise UserError(f"layout {key} = {getattr(layout, key)}: must be at least 1")
    if (micro := layout.micro_batch_sequences) is not None and micro < 1:
        raise UserError(f"layout micro_batch_sequences = {micro}: must be at least 1")
    if not layout.ranks:
        raise UserError("layout ranks = []: must have an entry for each tensor-parallel rank")
    if (size := layout.pp * layout.dp * layout.tp) != layout.world_size:
        raise UserError(
            f"layout world_size = {layout.world_size}: must be pp x dp x tp = {layout.pp} x {layout.dp} x {layout.tp} "
            f"= {size}"
        )
    block = layout.ep * layout.etp
    if layout.dp * layout.tp % block:
        raise UserError(
            f"layout ep x etp = {layout.ep} x {layout.etp}: must divide dp x tp = {layout.dp} x {layout.tp}"
        )
    if (entries := len(layout.expert_ranks)) != block:
        raise UserError(f"layout expert_ranks: has {entries} entries, must have ep x etp = {block}")


def _check_stages(layout: Layout, config: ModelShape) -> None:
    names = unit_names(config)
    _check_cover("stages", [(stage.begin_unit, stage.end_unit) for stage in layout.stages], len(names))
    require_schedule(layout.schedule, len(layout.stages), layout.pp)
    for index, stage in enumerate(layout.stages):
        for name in stage.recompute:
            if name in ENDS or name not in names[stage.begin_unit : stage.end_unit]:
                raise UserError(f'layout stages.{index}.recompute = "{name}": not a layer of that stage')


def _check_layer(layout: Layout, config: ModelShape, layer: int) -> None:
    _check_cover(f"kv_groups of layer {layer}", [s.kv_groups[layer] for s in layout.ranks], config.num_kv_heads)
    moe = config.moe if config.is_moe_layer(layer) else None
    columns = [shard.ffn_columns[layer] for shard in layout.ranks]
    if moe is None:
        _check_cover(f"ffn_columns of layer {layer}", columns, config.ffn_size)
        for what in ("experts", "columns"):
            _check_nothing(what, layer, "dense", [getattr(shard, what)[layer] for shard in layout.expert_ranks])
        return
    _check_nothing("ffn_columns", layer, "routed", columns)
    shards = layout.expert_ranks
    _check_cover(f"experts of layer {layer}", [s.experts[layer] for s in shards[:: layout.etp]], moe.num_experts)
    _check_cover(f"columns of layer {layer}", [s.columns[layer] for s in shards[: layout.etp]], moe.expert_size)
    for index, shard in enumerate(shards):
        ep, etp = divmod(index, layout.etp)
        for what, same, rank, wanted in (
            ("experts", "ep", ep, shards[ep * layout.etp].experts[layer]),
            ("columns", "etp", etp, shards[etp].columns[layer]),
        ):
            if (found := getattr(shard, what)[layer]) != wanted:
                raise UserError(
                    f"layout expert_ranks.{index}.{what}.{layer} = {_show(found)}: must be {_show(wanted)}, as on all "
                    f"ranks with {same} rank {rank}"
                )


def _check_nothing(what: str, layer: int, kind: str, ranges: Sequence[Range]) -> None:
    for index, found in enumerate(ranges):
        if found != (0, 0):
            raise UserError(
                f"layout {what} of layer {layer}, rank {index} = {_show(found)}: must be [0, 0], the layer is {kind}"
            )


def _show(span: Range) -> str:
    return f"[{span[0]}, {span[1]}]"


def _check_cover(what: str, ranges: Sequence[Range], size: int) -> None:
    position = 0
    for begin, end in ranges:
        if begin != position or end < begin:
            raise UserError(f"layout {what}: range [{begin}, {end}] must begin at {position}, and not end before it")
        position = end
    if position != size:
        raise UserError(f"layout {what}: the last range ends at {position}, must end at {size}")
