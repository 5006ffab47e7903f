"""A simulated step as a picture: one row a pipeline rank, one box an action, the waiting in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeforge.plan.actions import Kind
from moeforge.plan.simulator import Event, Simulation
from moeforge.report.canvas import compact, require_matplotlib, style
from moeforge.report.save import picture_format, save_figure
from moeforge.report.theme import Palette, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 12.0
"""Inches, so 864 points."""
_BOX = 0.78
"""Height of a box, of its row."""
_FONT = 8.5
_KINDS: dict[Kind, tuple[str, int]] = {
    "F": ("forward", 0),
    "B": ("backward", 1),
    "I": ("backward, inputs", 1),
    "W": ("backward, weights", 2),
}
"""Name and colour (of the palette's series) of each kind of action."""

Samples = Sequence[tuple[float, float]]
"""Of one rank: seconds, and the bytes of its activations from then on."""


def draw_timeline(simulation: Simulation, path: Path, title: str = "", memory: Sequence[Samples] | None = None) -> None:
    """Draw one step into an SVG or a PNG, as the suffix of `path` says.

    Boxes carry their micro-batch's number where it fits; the later a rank's stage (chunk), the lighter its boxes; the
    bubble of each rank stands at its right. `memory` has for every rank (seconds, bytes) of its activations, each
    valid until the next; they are drawn below. The picture appears whole or not at all.

    Raises UserError for another suffix, a missing directory or no matplotlib, RunError for a full disk.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    form = picture_format(path)
    palette = light()
    unit, per_second = ("s", 1.0) if simulation.step_seconds >= 2 else ("ms", 1e3)
    rows = min(max(0.42 * simulation.ranks, 1.0), 6.0)
    heights = [rows] if memory is None else [rows, 1.5]
    with matplotlib.rc_context(style(palette, size=10)):
        size = (WIDTH, sum(heights) + 0.55 * len(heights) + 0.75)
        figure = Figure(figsize=size, layout="constrained", facecolor=palette.surface)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _rows(axes[0], simulation, palette, per_second)
        seconds = f"{compact(float(f'{simulation.step_seconds * per_second:.4g}'))} {unit}"
        facts = f"step {seconds}, bubble {_percent(simulation.bubble_fraction)}"
        if len({event.action.stage for event in simulation.events}) > simulation.ranks:
            facts += "; the later a rank's stage, the lighter its boxes"
        axes[0].set_title(f"{title}\n{facts}" if title else facts, loc="left", fontsize="large", pad=30)
        if memory is not None:
            _memory(axes[1], memory, simulation, palette, per_second)
        axes[-1].set_xlabel(unit)
        save_figure(figure, path, form)


Box = tuple[int, float, float, str]
"""Rank, begin, end and what stands in it."""


@dataclass(frozen=True)
class _Group:
    """Boxes of one colour."""

    name: str
    color: Any
    boxes: list[Box]


def _rows(ax: Axes, simulation: Simulation, palette: Palette, per_second: float) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    ranks, end = simulation.ranks, simulation.step_seconds * per_second
    points = 0.86 * WIDTH * 72 / end if end else 0.0  # a unit of time on paper
    ax.set_xlim(0, end or 1)
    ax.set_ylim(ranks - 0.5, -0.5)
    ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    patches: defaultdict[str, list[Patch]] = defaultdict(list)
    for group in _groups(simulation, palette, per_second):
        typical = float(np.median([stop - start for _, start, stop, _ in group.boxes])) * points
        edge = 0.6 if typical > 4 else 0.0  # lines between boxes of a point or two would hide them
        corners = np.array([_corners(*box[:3]) for box in group.boxes])
        collection = PolyCollection(corners, facecolors=group.color, edgecolors=palette.surface, linewidths=edge)
        collection.set_gid(f"{group.name.replace(', ', '-')}-{len(patches[group.name])}")
        ax.add_collection(collection, autolim=False)
        patches[group.name].append(Patch(color=group.color))
        ink = palette.surface if _is_dark(group.color) else palette.ink
        for rank, start, stop, text in group.boxes:
            if text and (stop - start) * points > 0.62 * _FONT * len(text) + 2:
                ax.text((start + stop) / 2, rank, text, color=ink, fontsize=_FONT, ha="center", va="center_baseline")
    beside = {"textcoords": "offset points", "color": palette.muted}
    ax.annotate("bubble", (1, 1), xycoords="axes fraction", xytext=(8, 4), **beside)
    for rank, share in enumerate(simulation.bubble_by_rank):
        place = {"xycoords": ("axes fraction", "data"), "xytext": (8, 0), "va": "center"}
        ax.annotate(_percent(share), (1, rank), **place, **beside)
    ax.legend(
        [tuple(shades) for shades in patches.values()],
        list(patches),
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},  # the shades of a kind side by side
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(patches),
        frameon=False,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
        borderaxespad=0.1,
    )


def _groups(simulation: Simulation, palette: Palette, per_second: float) -> list[_Group]:
    """All boxes, the waiting behind them first; those without length are left out."""
    chunks = _chunks(simulation.events)
    last = max(chunks.values())
    boxes: defaultdict[tuple[Kind, int], list[Box]] = defaultdict(list)
    for rank, (stage, kind, micro_batch), start, stop in simulation.events:
        if stop > start:
            box = (rank, start * per_second, stop * per_second, str(micro_batch))
            boxes[kind, chunks[rank, stage]].append(box)
    done, end = simulation.pipeline_seconds * per_second, simulation.step_seconds * per_second
    ranks = range(simulation.ranks)
    found = [_Group("waiting", palette.grid, [(rank, 0.0, done, "") for rank in ranks])]
    for kind, (name, color) in _KINDS.items():
        for chunk in range(last + 1):
            if own := boxes.get((kind, chunk)):
                found.append(_Group(name, _lighter(palette.series[color], 0.55 * chunk / max(last, 1)), own))
    if end > done:
        found.append(_Group("update", palette.muted, [(rank, done, end, "") for rank in ranks]))
    return found


def _chunks(events: Sequence[Event]) -> dict[tuple[int, int], int]:
    """Of every (rank, stage): the how-manieth of the rank's stages it is."""
    pairs = sorted({(event.rank, event.action.stage) for event in events})
    seen: defaultdict[int, int] = defaultdict(int)
    found = {}
    for rank, stage in pairs:
        found[rank, stage] = seen[rank]
        seen[rank] += 1
    return found


def _memory(ax: Axes, memory: Sequence[Samples], simulation: Simulation, palette: Palette, per_second: float) -> None:
    """Activation bytes of every rank as steps."""
    most = 0.0
    for rank, samples in enumerate(memory):
        times = [seconds * per_second for seconds, _ in samples] + [simulation.step_seconds * per_second]
        gib = [amount / 2**30 for _, amount in samples]
        most = max(most, *gib)
        color = palette.layer(rank, len(memory))
        ax.step(times, [*gib, gib[-1]], where="post", color=color, linewidth=1.2, label=f"rank {rank}")
    ax.set_ylim(0, 1.08 * most or 1)
    ax.set_ylabel("activations, GiB")
    handles, labels = ax.get_legend_handles_labels()
    shown = range(len(labels)) if len(labels) <= 8 else (0, len(labels) - 1)
    ax.legend(
        [handles[i] for i in shown],
        [labels[i] for i in shown],
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize="small",
        handlelength=1.1,
        labelspacing=0.2,
    )


def _corners(rank: int, start: float, stop: float) -> list[tuple[float, float]]:
    low, high = rank - _BOX / 2, rank + _BOX / 2
    return [(start, low), (stop, low), (stop, high), (start, high)]


def _lighter(color: str, share: float) -> tuple[float, float, float]:
    """Mixed with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (part + (1 - part) * share for part in to_rgb(color))
    return red, green, blue


def _is_dark(color: Any) -> bool:
    """Whether white is better to read on it than black (relative luminance, roughly)."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) < 0.62


def _percent(share: float) -> str:
    return f"{max(100 * share, 0):.1f} %"
