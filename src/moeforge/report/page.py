"""The HTML page: one file, nothing loaded from anywhere, light or dark as the reader's system asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeforge.errors import UserError
from moeforge.files import write_whole
from moeforge.report import panels
from moeforge.report.canvas import require_matplotlib
from moeforge.report.panels import Panel
from moeforge.report.runs import Run, load_runs
from moeforge.report.series import MAX_LAYER_POINTS, MAX_POINTS
from moeforge.report.summary import Fact, facts, layer_table, summarize
from moeforge.report.theme import RAMP_STEPS, dark, light


@dataclass(frozen=True)
class Section:
    """A titled group of panels."""

    title: str
    text: str
    panels: list[Panel]


@dataclass(frozen=True)
class RunPage:
    """What the page shows of one run alone."""

    run: Run
    color: str
    headline: str
    facts: list[Fact]
    notes: list[str]
    sections: list[Section]
    columns: list[str]
    rows: list[list[str]]


def write_report(paths: list[Path], out: Path | None = None) -> dict[str, Any]:
    """Write one page about one run, or comparing several; returns what `moeforge report --json` prints.

    The page goes to `out`; without it, into the run's own directory as report.html, or, for several runs, to
    the current directory. It appears whole or not at all.

    Raises:
        UserError: no run given, a path without metrics, a run twice, no matplotlib, or an unwritable `out`.
        RunError: the disk is full; an earlier page is kept.
    """
    require_matplotlib()
    if not paths:
        raise UserError("report: no run given; name at least one run directory")
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"report: {path} is given twice; name each run once")
    runs = load_runs([Path(path) for path in paths])
    if out is None:
        out = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    if out.is_dir():
        raise UserError(f"--out {out}: is a directory; name the HTML file to write")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the directory {out.parent} does not exist")
    html = render_page(runs)
    write_whole(out, html)
    return {"report": str(out), "bytes": len(html.encode()), "runs": [summarize(run) for run in runs]}


def render_page(runs: list[Run]) -> str:
    """The HTML text of a report about these runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moeforge.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    x = _horizontal(runs)
    pages = [_run_page(run, i, len(runs), x) for i, run in enumerate(runs)]
    shared = [Section("Training", "", panels.training(runs, x))]
    if len(runs) > 1 and any(run.layers for run in runs):
        text = "Means over the MoE layers, run against run; each run's own layers follow below."
        shared.append(Section("Routing compared", text, panels.comparison(runs, x)))
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else "Comparison of " + ", ".join(run.name for run in runs),
        pages=pages,
        shared=shared,
        comparison=_comparison(pages) if len(runs) > 1 else [],
        themes={"light": light().variables(), "dark": dark().variables()},
        ramp=", ".join(f"var(--ramp-{i})" for i in range(RAMP_STEPS)),
        thinned=_thinned(runs),
    )


def _run_page(run: Run, index: int, count: int, x: str) -> RunPage:
    summary = summarize(run)
    prefix = f"run{index}-" if count > 1 else ""
    sections = []
    if run.layers:
        text = "Drop rate and α of every MoE layer over time, and how evenly the experts are used."
        sections.append(Section("Balance", text, panels.balance(run, prefix, x)))
        text = "How decided the router is: flat gates turn a mixture of experts into a plain average."
        sections.append(Section("Gate", text, panels.gate(run, prefix, x)))
        text = "Upcycled experts start as copies; the sooner they differ, the more there is to route between."
        sections.append(Section("Specialisation", text, [panels.similarity(run, prefix, x)]))
    columns, rows = layer_table(run)
    color = f"var(--series-{index % 8})"
    return RunPage(run, color, _headline(run), facts(summary), list(run.notes), sections, columns, rows)


def _headline(run: Run) -> str:
    model = run.model
    if model is None:
        return ""
    parts = [f"{model.family}, {model.num_layers} layers of width {model.hidden_size:,}"]
    if model.moe is None:
        parts.append("dense")
    else:
        moe = model.moe
        norm = "no gate normalisation" if moe.gate_norm is None else f"gate normalisation λ = {moe.gate_norm:g}"
        parts += [f"{moe.num_experts} experts, top-{moe.top_k}", norm]
    return " · ".join(parts)


def _comparison(pages: list[RunPage]) -> list[tuple[str, str, list[str]]]:
    """Rows of the comparing table: name, note, one value a run."""
    return [(fact.name, fact.note, [page.facts[i].value for page in pages]) for i, fact in enumerate(pages[0].facts)]


def _horizontal(runs: list[Run]) -> str:
    """The horizontal axis: steps, or tokens where a step is not the same number of tokens in every run."""
    rates = [np.nanmax(run["tokens"]) / max(run.steps, 1) for run in runs if np.isfinite(run["tokens"]).any()]
    same = len(rates) < len(runs) or max(rates) <= 1.01 * min(rates)
    return "step" if same else "tokens"


def _thinned(runs: list[Run]) -> str:
    longest = max(len(run["step"]) for run in runs)
    parts = []
    if longest > MAX_POINTS:
        parts.append(f"{MAX_POINTS:,} points a line")
    if longest > MAX_LAYER_POINTS and any(run.layers for run in runs):
        parts.append(f"{MAX_LAYER_POINTS} a layer")
    if not parts:
        return ""
    limits = ", ".join(parts)
    return f"Long series are thinned to {limits}: the lowest and highest of each stretch, so spikes stay."
