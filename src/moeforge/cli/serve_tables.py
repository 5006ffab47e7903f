"""What `moeforge plan serve` shows a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeforge.cli.plan_tables import table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def serving_report(result: dict[str, Any]) -> Group:
    """The ranks, whether it fits and beside what, the step times, and what to know."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(_facts(result)), "", _ranks(result), "", Text(_verdict(result))]
    if result["kv_tokens"] and len(result["ranks"]) > 1:
        parts += ["", _comparison(result)]
    if result["curve"]:
        parts += ["", _curve(result)]
    parts += ["", *(Text(f"- {line}") for line in _notes(result))]
    if result["out"]:
        parts += ["", Text(f"layout in {result['out']}, for moeforge serve --plan")]
    return Group(*parts)


def _facts(result: dict[str, Any]) -> str:
    kv = "fp8" if result["kv_cache_dtype"] == "fp8" else result["dtype"]
    return (
        "{model} on {gpus}: {weights} weights, {kv} KV cache, sequences of at most {max_model_len:,} tokens\n"
        "{params_total:,} parameters ({params_active:,} active), {gb:,.1f} GB of weights on all GPUs together"
    ).format(**result, kv=kv, gb=result["weight_bytes"] / 1e9)


def _ranks(result: dict[str, Any]) -> Table:
    names = ("GPU", "heads", "KV heads", "columns", "usable GB", "weights GB", "KV GB", "KV tokens")
    made = table("rank", *names, "works ms", "waits ms")
    for rank in result["ranks"]:
        free = rank["usable_bytes"] - rank["weight_bytes"]
        made.add_row(
            str(rank["rank"]),
            rank["gpu"],
            _span(rank["heads_by_layer"]),
            _span(rank["kv_heads_by_layer"]),
            _span(rank["ffn_columns_by_layer"]),
            f"{rank['usable_bytes'] / 1e9:,.2f}",
            f"{rank['weight_bytes'] / 1e9:,.2f}",
            f"{free / 1e9:,.2f}",
            "any" if rank["kv_tokens"] is None else f"{rank['kv_tokens']:,}",
            f"{rank['step_ms']:,.1f}",
            f"{rank['wait_ms']:,.1f}",
        )
    return made


def _span(counts: list[int]) -> str:
    """Fewest and most of any layer."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _verdict(result: dict[str, Any]) -> str:
    if result["fits"]:
        return (
            f"fits: {result['kv_tokens']:,} KV tokens ({result['num_blocks']:,} pages of "
            f"{result['block_size_tokens']}), {result['most_sequences']} sequences of {result['context_tokens']:,} "
            "at once"
        )
    (problem,) = [line for line in result["warnings"] if line.startswith("does not fit")]
    remedies = [f"  {remedy['options']}  ({remedy['kv_tokens']:,} KV tokens)" for remedy in result["would_fit"]]
    return "\n".join([problem, "it would fit with", *remedies] if remedies else [problem, "no option makes it fit"])


def _comparison(result: dict[str, Any]) -> Table:
    made = table("on the same GPUs", "KV tokens", "with fp8 KV cache")
    for row in result["comparison"]:
        made.add_row(row["layout"], f"{row['kv_tokens']:,}", f"{row['kv_tokens_fp8']:,}")
    return made


def _curve(result: dict[str, Any]) -> Table:
    made = table("sequences", "step ms", "compute", "all-reduce", "logits", "tokens/s", "tokens/s each")
    for point in result["curve"]:
        made.add_row(
            str(point["batch"]),
            f"{point['step_ms']:,.1f}",
            f"{point['compute_ms']:,.1f}",
            f"{point['all_reduce_ms']:,.1f}",
            f"{point['logits_gather_ms']:,.1f}",
            f"{point['tokens_per_second']:,.0f}",
            f"{point['tokens_per_second'] / point['batch']:,.1f}",
        )
    return made


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [line for line in result["warnings"] if not line.startswith("does not fit")]
    batch, context = result["step_batch"], result["context_tokens"]
    sequences = f"{batch} sequence{'' if batch == 1 else 's'}"
    notes.append(f"works and waits: a decode step of {sequences} with {context:,} live tokens each, collectives apart")
    if len(result["ranks"]) > 1:
        notes.append(
            f"all-reduces assume {result['bus_gbytes_per_second']:g} GB/s and {result['all_reduce_latency_us']:g} us; "
            "no host time; experts evenly used"
        )
    if result["weights"] == "fp8" or any("--weights fp8" in remedy["options"] for remedy in result["would_fit"]):
        notes.append("FP8 weights: those of a checkpoint that moeforge quantize wrote, or one like it")
    return notes
