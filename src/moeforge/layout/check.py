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
                if len(getattr(shard, key)) != config.num_layers:
                    raise UserError(f"layout {what}.{index}.{key}: must have {config.num_layers} layers")
    for layer in range(config.num_layers):
        _check_layer(layout, config, layer)


def _check_sizes(layout: Layout) -> None:
    for key in ("pp", "dp", "ep", "etp"):
        if getattr(layout, key) < 1:
            raise UserError(f"layout {key} = {getattr(layout, key)}: must be at least 1")
    if not layout.ranks:
        raise UserError("layout ranks: must have at least one tensor-parallel rank")
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
    if len(layout.expert_ranks) != block:
        raise UserError(f"layout expert_ranks: must have ep x etp = {block} entries, not {len(layout.expert_ranks)}")


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
    routed = config.moe is not None and config.is_moe_layer(layer)
    columns = [shard.ffn_columns[layer] for shard in layout.ranks]
    if not routed:
        _check_cover(f"ffn_columns of layer {layer}", columns, config.ffn_size)
        held = [each for shard in layout.expert_ranks for each in (shard.experts[layer], shard.columns[layer])]
        if any(each != (0, 0) for each in held):
            raise UserError(f"layout expert_ranks of layer {layer}: must be (0, 0), the layer is dense")
        return
    assert config.moe is not None
    if any(each != (0, 0) for each in columns):
        raise UserError(f"layout ffn_columns of layer {layer}: must be (0, 0), the layer is routed")
    etp, shards = layout.etp, layout.expert_ranks
    _check_cover(f"experts of layer {layer}", [s.experts[layer] for s in shards[::etp]], config.moe.num_experts)
    _check_cover(f"columns of layer {layer}", [s.columns[layer] for s in shards[:etp]], config.moe.expert_size)
    for index, shard in enumerate(shards):
        first_of_row, first_of_column = shards[index - index % etp], shards[index % etp]
        if (
            shard.experts[layer] != first_of_row.experts[layer]
            or shard.columns[layer] != first_of_column.columns[layer]
        ):
            raise UserError(
                f"layout expert_ranks.{index} of layer {layer}: the experts may differ only between ep ranks, the "
                "columns only between etp ranks"
            )


def _check_cover(what: str, ranges: Sequence[Range], size: int) -> None:
    position = 0
    for begin, end in ranges:
        if begin != position or end < begin:
            raise UserError(f"layout {what}: range {begin}..{end} does not continue at {position}")
        position = end
    if position != size:
        raise UserError(f"layout {what}: end at {position}, must end at {size}")
