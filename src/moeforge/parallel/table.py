"""The mesh in words: what a run prints before its first step."""

from __future__ import annotations

from collections.abc import Iterator

from moeforge.layout import Layout
from moeforge.partition import Range


def expert_mode(layout: Layout) -> str:
    """EDP, EP, ETP (Skywork-MoE, appendix B.1) or a mixture of them."""
    modes = {"EDP": (layout.tp, 1), "EP": (layout.dp * layout.tp, 1), "ETP": (layout.dp, layout.tp)}
    return next((mode for mode, sizes in modes.items() if sizes == (layout.ep, layout.etp)), "mixture")


def mesh_table(layout: Layout, ranks_per_node: int | None = None) -> str:
    """Sizes, groups with an example each, and what every stage and rank holds, in Megatron's terms.

    A group that spans nodes of `ranks_per_node` ranks (None: all on one) is marked.
    """
    sizes = f"pp {layout.pp} x dp {layout.dp} x tp {layout.tp}"
    experts = f"{expert_mode(layout)}: ep {layout.ep}, etp {layout.etp}, expert_dp {layout.expert_dp}"
    lines = [f"{layout.world_size} ranks = {sizes}; {experts}; schedule {layout.schedule}", ""]
    lines += _columns([("group", "size", "groups", "first ranks", ""), *_groups(layout, ranks_per_node)])
    lines += ["", *_columns([("stage", "pp rank", "units", "layers", "recomputed"), *_stages(layout)])]
    lines += ["", *_columns([("rank in stage", "KV groups by layer", "experts by layer", "columns"), *_ranks(layout)])]
    return "\n".join(lines)


def _groups(layout: Layout, ranks_per_node: int | None) -> Iterator[tuple[str, ...]]:
    node = ranks_per_node or layout.world_size
    at = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for name, same in (
        ("tp", ("pp", "dp")),
        ("dp", ("pp", "tp")),
        ("pp", ("dp", "tp")),
        ("expert block", ("pp", "expert_dp")),
        ("expert_dp", ("pp", "expert_rank")),
    ):
        members: dict[tuple[int, ...], list[int]] = {}
        for rank, each in enumerate(at):
            members.setdefault(tuple(getattr(each, key) for key in same), []).append(rank)
        first = next(iter(members.values()))
        shown = ", ".join(map(str, first[:8])) + (", ..." if len(first) > 8 else "")
        across = any(group[0] // node != group[-1] // node for group in members.values())
        yield name, str(len(first)), str(len(members)), shown, "crosses nodes" if across else ""


def _stages(layout: Layout) -> Iterator[tuple[str, ...]]:
    last = layout.stages[-1].end_unit - 1
    for index, stage in enumerate(layout.stages):
        units = range(stage.begin_unit, stage.end_unit)
        ends = [name for name, unit in (("embedding", 0), ("head", last)) if unit in units]
        layers = (len(units) - len(ends)) / 2
        again = len({name.rpartition(".")[0] for name in stage.recompute})
        held = " + ".join([f"{layers:g}", *ends])
        yield str(index), str(layout.pp_rank_of(index)), f"{stage.begin_unit}..{stage.end_unit}", held, str(again)


def _ranks(layout: Layout) -> Iterator[tuple[str, ...]]:
    for rank in range(min(layout.dp * layout.tp, 16)):
        at = layout.coordinates(rank)
        experts = layout.expert_ranks[at.expert_rank]
        yield (
            f"{rank} (dp {at.dp}, tp {at.tp}, ep {at.ep}, etp {at.etp})",
            _sizes(layout.ranks[at.tp].kv_groups),
            _sizes(experts.experts),
            _sizes(experts.columns),
        )


def _sizes(ranges: tuple[Range, ...]) -> str:
    """Lengths, one a layer; the first six, since they rotate."""
    lengths = [end - begin for begin, end in ranges]
    if len(set(lengths)) == 1:
        return str(lengths[0])
    return " ".join(map(str, lengths[:6])) + (" ..." if len(lengths) > 6 else "")


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
