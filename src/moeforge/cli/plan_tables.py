"""What `moeforge plan train` shows a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def plan_report(result: dict[str, Any]) -> Group:
    """The arrangement, the stages beside uniform ones, and why."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_facts(result)), "", _stages(result), "", _totals(result), ""]
    parts += [Text(f"- {reason}") for reason in result["why"]]
    parts.append(Text(f"- MFU: {result['mfu_convention']}"))
    if exported := result.get("export"):
        parts += ["", Text(exported["text"]), *(Text(f"note: {note}") for note in exported["notes"])]
    if result["out"]:
        parts += ["", Text(f"plan in {result['out']}, for moeforge train --plan")]
    return Group(*parts)


def _facts(result: dict[str, Any]) -> str:
    mode = f"; experts {result['expert_mode']}: ep {{ep}} x etp {{etp}} x expert_dp {{expert_dp}}"
    return (
        "{target} on {cluster}, {precision}\n{params_total:,} parameters ({params_active:,} active)\n"
        "{batch_sequences} x {sequence_length} tokens a step, {micro_batches} micro-batches of "
        "{micro_batch_sequences} a pipeline\n"
        "{world_size} process{es} = pp {pp} x dp {dp} x tp {tp}"
        + (mode if result["expert_mode"] else "")
        + "\nschedule {schedule}, {chunks} stage{s} a rank"
    ).format(**result, s="" if result["chunks"] == 1 else "s", es="" if result["world_size"] == 1 else "es")


def _stages(result: dict[str, Any]) -> Table:
    made = table("stage", "rank", "layers", "recomp.", "fwd ms", "bwd ms", "peak GB", "uniform", "recomp.")
    for index, (own, even) in enumerate(zip(result["stages"], result["uniform"]["stages"], strict=True)):
        begin, end = own["units"]
        ends = [name for name, unit in (("E", 0), ("H", len(result["units"]) - 1)) if begin <= unit < end]
        made.add_row(
            str(index),
            str(own["pp_rank"]),
            "+".join([f"{own['layers']:g}", *ends]),
            _recomputed(own),
            f"{own['forward_ms']:,.1f}",
            f"{own['backward_ms']:,.1f}",
            f"{own['peak_memory_bytes'] / 1e9:,.1f}",
            f"{even['layers']:g}",
            _recomputed(even),
        )
    return made


def _recomputed(stage: dict[str, Any]) -> str:
    """Layers of which both units are recomputed, and single units."""
    units = stage["recompute_units"]
    kinds = [unit.rpartition(".")[2] for unit in units]
    if kinds.count("attention") == kinds.count("ffn"):
        return str(stage["recompute_layers"])
    shown = {"attention": "attn", "ffn": "ffn"}
    return "+".join(f"{kinds.count(kind)} {name}" for kind, name in shown.items() if kind in kinds)


def _totals(result: dict[str, Any]) -> Table:
    made = table("", "step ms", "tokens/s/GPU", "MFU", "bubble", "peak GB", "fits")
    for name, own in (("planned", result), ("uniform", result["uniform"])):
        made.add_row(
            name,
            f"{own['step_ms']:,.1f}",
            f"{own['tokens_per_second_per_gpu']:,.1f}",
            f"{own['mfu']:.1%}",
            f"{own['bubble_fraction']:.1%}",
            f"{own['peak_memory_bytes'] / 1e9:,.1f}",
            "yes" if own["fits"] else "no",
        )
    return made


def table(first: str, *figures: str) -> Table:
    """Columns without lines; all but the first to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column(first)
    for name in figures:
        made.add_column(name, justify="right", overflow="fold")  # numbers are never cut
    return made
