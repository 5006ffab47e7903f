"""What `moeforge bench kernels` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeforge.cli.plan_tables import table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def cpu_tables(result: Mapping[str, Any]) -> Group:
    """Matmuls with the share of their limit, then the rest; "x" is a peer's time over ours."""
    from rich.console import Group

    limits = "{read_gbytes_per_second:.1f} GB/s read, {bf16_gflops:.0f} GFLOP/s bf16".format(**result["limits"])
    facts = f"{result['native'] or 'no native library'}, {result['machine']['threads']} threads, {limits}"
    columns = ("bf16 us", "of limit", "x onednn", "x torch", "fp8 us", "of limit", "x bf16")
    matmuls = table("model", "kernel", "rows", *columns)
    for case in result["matmuls"]:
        bf16, fp8 = case["bf16"], case["fp8"]
        over = (_times(bf16["speedup_over"].get(peer)) for peer in ("onednn", "torch"))
        fast = (f"{fp8['microseconds']:.0f}", _share(fp8), _times(fp8["speedup_over"]["bf16"]))
        cells = (f"{bf16['microseconds']:.0f}", _share(bf16), *over, *fast)
        matmuls.add_row(case["model"], case["kernel"], str(case["rows"]), *cells)
    others = table("model", "kernel", "rows", "us", "of limit", "x torch")
    for case in result["others"]:
        share = f"{case['fraction_of_limit']:.0%}" if "fraction_of_limit" in case else ""
        cells = (f"{case['microseconds']:.1f}", share, _times(case["speedup_over"]["torch"]))
        others.add_row(case["model"], case["kernel"], str(case["rows"]), *cells)
    return Group(facts, matmuls, "", others)


def gpu_table(cases: Sequence[dict[str, Any]]) -> Table:
    """Every number of every case."""
    from moeforge.bench.gpu_report import flat, shown

    made = table("case", "", "")
    for case in cases:
        for index, (name, value) in enumerate(flat(case)):
            made.add_row("" if index else case["case"], name, shown(value))
    return made


def _share(side: Mapping[str, Any]) -> str:
    return f"{side['fraction_of_limit']:.0%} {side['limit']}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
