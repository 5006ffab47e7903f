"""What each chart shows: functions that draw a run into matplotlib axes, for the HTML page and the PNG.

Legend: R rows of metrics, L MoE layers, E experts. Figures are those of Skywork-MoE (arXiv 2406.06563).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moeforge.report.canvas import compact, hoverable, rounded
from moeforge.report.runs import Array, GateDistribution, Run
from moeforge.report.series import (
    MAX_LAYER_POINTS,
    finite,
    mean_over_layers,
    smooth,
    smoothing_steps,
    thin,
)
from moeforge.report.theme import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELS = 6


def loss(ax: Axes, runs: list[Run], palette: Palette, x: str = "step") -> None:
    """Training loss (faint), its moving average and the held-out loss (dots) of every run.

    A single run's dots have a colour of their own."""
    ends = []
    for i, run in enumerate(runs):
        color = palette.run(i)
        known_x, known = finite(run[x], run["loss"])
        steps = smoothing_steps(len(known))
        if steps > 1:
            ax.plot(*thin(known_x, known), color=color, linewidth=0.9, alpha=0.28)
        end = _line(ax, known_x, smooth(known, steps), color, f"{run.name} train")
        ends.append((end[0], f"{end[0]:.3f}", color))
        held_x, held = finite(run[x], run["eval_loss"])
        if len(held):
            color = palette.series[1] if len(runs) == 1 else color
            dots = {
                "marker": "o",
                "markersize": 6.5,
                "markeredgecolor": palette.surface,
                "markeredgewidth": 1,
            }
            (line,) = ax.plot(held_x, held, color=color, linewidth=1, linestyle=(0, (1, 2.5)), **dots)
            hoverable(line, f"{run.name} held-out")
            if len(runs) > 1:
                ends.pop()  # one label a run is enough
            ends.append((float(held[-1]), f"{held[-1]:.3f}", color))
    finish(ax, x, ends)


def scalar(ax: Axes, runs: list[Run], palette: Palette, key: str, x: str = "step", smoothed: bool = False) -> None:
    """One number a step for every run; with `smoothed`, its moving average over the faint raw line.

    The axis is logarithmic where spikes would flatten the rest."""
    ends = []
    for i, run in enumerate(runs):
        color = palette.run(i)
        known_x, known = finite(run[x], run[key])
        steps = smoothing_steps(len(known)) if smoothed else 1
        if steps > 1:
            ax.plot(*thin(known_x, known), color=color, linewidth=0.9, alpha=0.28)
        ends.append(_line(ax, known_x, smooth(known, steps), color, run.name))
        if key == "grad_norm" and len(known) and known.min() > 0 and known.max() > 20 * np.median(known):
            ax.set_yscale("log")
    finish(ax, x, ends, zero=True)


def layer_means(ax: Axes, runs: list[Run], palette: Palette, key: str, x: str = "step", zero: bool = True) -> None:
    """The mean over layers of one balance measure, one line a run (dense runs have none)."""
    ends = []
    for i, run in enumerate(runs):
        if run.layers:
            known_x, known = finite(run[x], mean_over_layers(run.by_layer[key]))
            known = smooth(known, layer_smoothing(key, len(known)))
            ends.append(_line(ax, known_x, known, palette.run(i), run.name))
    finish(ax, x, ends, zero=zero)


def layer_smoothing(key: str, count: int) -> int:
    """The time constant, in steps, of a layer measure's moving average.

    Measures of one batch are noisy, and many noisy lines hide each other; α is an average already and the
    similarity hardly moves."""
    return 1 if key in ("aux_coef", "expert_similarity") else smoothing_steps(count)


def layers(ax: Axes, run: Run, palette: Palette, key: str, x: str = "step", zero: bool = True) -> None:
    """One line a layer, coloured from the first layer to the last; the highest and lowest ends are named."""
    ends = []
    values = run.by_layer[key]
    values = smooth(values, layer_smoothing(key, int(np.isfinite(values).any(axis=1).sum())))
    for i, layer in enumerate(run.layers):
        known_x, known = finite(run[x], values[:, i])
        color = palette.layer(i, len(run.layers))
        end = _line(ax, known_x, known, color, f"layer {layer}", MAX_LAYER_POINTS)
        ends.append((end[0], f"{end[1]}  layer {layer}", palette.ink))
    if len(run.layers) > 8:
        for line in ax.lines:
            line.set_linewidth(1.15)
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    finish(ax, x, ends if len(ends) <= 3 else [ends[0], ends[-1]], zero=zero)


def load_spread(ax: Axes, run: Run, palette: Palette, x: str = "step") -> None:
    """The busiest expert's load over the mean load: mean over layers, and the band of all layers."""
    values = run.by_layer["load_max_over_mean"]
    known = np.isfinite(values).any(axis=1)
    if known.any():
        steps = smoothing_steps(int(known.sum()))
        low_x, low = thin(run[x][known], smooth(np.nanmin(values[known], axis=1), steps))
        high_x, high = thin(run[x][known], smooth(np.nanmax(values[known], axis=1), steps))
        grid = np.union1d(low_x, high_x)
        band = {"color": palette.run(0), "alpha": 0.14, "linewidth": 0}
        ax.fill_between(grid, np.interp(grid, low_x, low), np.interp(grid, high_x, high), **band)
    known_x, mean = finite(run[x], mean_over_layers(values))
    mean = smooth(mean, smoothing_steps(len(mean)))
    end = _line(ax, known_x, mean, palette.run(0), "mean over layers")
    ax.axhline(1, color=palette.muted, linewidth=1, linestyle=(0, (3, 3)))
    finish(ax, x, [end])


def load_colors(load: Array, palette: Palette) -> Array:
    """Each expert's share against the even share as a colour: [L, E] -> RGBA [L, E, 4].

    Even is transparent, twice as much or more full orange, half or less full blue, on a logarithmic scale."""
    from matplotlib.colors import to_rgb

    level = np.log2(np.clip(load * load.shape[1], 0.5, 2.0))
    color = np.where(level[..., None] > 0, to_rgb(palette.series[1]), to_rgb(palette.series[0]))
    return np.concatenate([color, np.abs(level)[..., None]], axis=-1)


def load_map(ax: Axes, run: Run, palette: Palette, colors: Palette) -> None:
    """Heat map of expert load, a column a layer, a row an expert; `colors` are real, no placeholders."""
    assert run.load is not None
    columns, rows = run.load.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    image = load_colors(run.load, colors).transpose(1, 0, 2)
    ax.axhspan(-0.5, rows - 0.5, color=palette.grid, alpha=0.5, linewidth=0, zorder=-1)  # what "even" looks like
    ax.imshow(image, aspect="auto", interpolation="none", extent=extent)
    gap = 2.0 if rows <= 16 else 1.0
    ax.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color=palette.surface, linewidth=gap)
    ax.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color=palette.surface, linewidth=gap)
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ticks = range(0, columns, -(-columns // 18))
    ax.set_xticks(ticks, [str(run.layers[i]) for i in ticks])
    ax.set_yticks(range(0, rows, -(-rows // 16)))
    ax.set_xlabel("layer")
    ax.set_ylabel("expert")


def gate_layers(run: Run) -> list[int]:
    """The layers whose gates are drawn: first, middle and last of those recorded."""
    known = sorted(run.gates[-1].layers) if run.gates else []
    return sorted({known[0], known[len(known) // 2], known[-1]}) if known else []


def gate_is_normalised(run: Run) -> bool:
    """Whether the recorded gates differ from a plain softmax of the same logits."""
    pairs = [(g.normalised, g.unnormalised) for g in run.gates[-1].layers.values()] if run.gates else []
    return any(plain is not None and not np.allclose(gate, plain, atol=1e-6) for gate, plain in pairs)


def gates(axes: list[Axes], run: Run, palette: Palette) -> None:
    """Figure 2: mean gate probabilities sorted per token, with normalisation and (same logits) without.

    The first recording is faint, the last one full. One axes for each of `gate_layers`."""
    for ax, layer in zip(axes, gate_layers(run), strict=True):
        for recording in run.gates:
            last = recording is run.gates[-1]
            if layer in recording.layers:
                _gate_lines(ax, recording.layers[layer], palette, recording.step, last, gate_is_normalised(run))
        experts = len(run.gates[-1].layers[layer].normalised)
        ax.axhline(1 / experts, color=palette.muted, linewidth=1, linestyle=(0, (3, 3)))
        ax.set_title(f"layer {layer}", fontsize="medium", color=palette.ink, loc="left", pad=8)
        ax.set_xlim(0.7, experts + 0.3)
        ax.set_xticks(np.unique(np.linspace(1, experts, min(experts, 8)).round().astype(int)))
        ax.set_xlabel("rank of the expert")
    axes[0].set_ylim(0, 1.05 * max(_peak(run, layer) for layer in gate_layers(run)))  # the axes share it


def _peak(run: Run, layer: int) -> float:
    kinds = [(g.normalised, g.unnormalised) for g in (r.layers[layer] for r in run.gates if layer in r.layers)]
    return max(float(values.max()) for pair in kinds for values in pair if values is not None)


def _gate_lines(ax: Axes, gate: GateDistribution, palette: Palette, step: int, last: bool, both: bool) -> None:
    kinds = [("with normalisation" if both else "gate", gate.normalised, palette.series[0])]
    if both and gate.unnormalised is not None:
        kinds.append(("without", gate.unnormalised, palette.series[1]))
    for label, values, color in kinds:
        marker = {"marker": "o", "markersize": 3.5 if len(values) <= 16 else 0}
        alpha = 1.0 if last else 0.38
        (line,) = ax.plot(np.arange(1, len(values) + 1), values, color=color, alpha=alpha, **marker)
        hoverable(line, f"{label}, step {step}")


def finish(ax: Axes, x: str, ends: list[tuple[float, str, str]], zero: bool = False) -> None:
    """Axis names, readable ticks, and the values at the right end of the lines; `zero` keeps 0 in sight."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if zero and ax.get_yscale() == "linear" and ax.dataLim.y1 > 0:
        ax.set_ylim(0, 1.06 * ax.dataLim.y1)
    ax.set_xlabel(x)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    formatter = FuncFormatter(lambda value, _: compact(value))
    ax.xaxis.set_major_formatter(formatter)
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(formatter)
    _end_labels(ax, [end for end in ends if np.isfinite(end[0])][:MAX_LABELS])


def _line(ax: Axes, x: Array, y: Array, color: str, label: str, limit: int | None = None) -> tuple[float, str, str]:
    """Draw one line, a dot where it has a single point, and return its end label (height, text, colour)."""
    if not len(y):
        return float("nan"), "", color
    drawn = thin(x, y, limit) if limit else thin(x, y)
    (line,) = ax.plot(*drawn, color=color, marker="o" if len(y) == 1 else "", markersize=5)
    hoverable(line, label)
    return float(y[-1]), rounded(float(y[-1])), color


def _end_labels(ax: Axes, ends: list[tuple[float, str, str]], gap: float = 14.0) -> None:
    """Write the labels right of the axes, moved apart where they would overlap (`gap` in points)."""
    if not ends:
        return
    ax.autoscale_view()  # matplotlib postpones it, and transData would still be the unit square's
    height = ax.get_window_extent().height
    ends = sorted(ends, key=lambda end: end[0])
    places = [float(ax.transData.transform((1, y))[1]) for y, _, _ in ends]
    up, down = list(places), list(places)
    for i in range(1, len(places)):
        up[i] = max(up[i], up[i - 1] + gap)
        down[-1 - i] = min(down[-1 - i], down[-i] - gap)
    places = [(high + low) / 2 for high, low in zip(up, down, strict=True)]  # keeps the gap, and the middle
    bottom = ax.get_window_extent().y0
    for place, (_, text, color) in zip(places, ends, strict=True):
        at = (1.0, (place - bottom) / height)
        offset = {"xytext": (6, 0), "textcoords": "offset points", "xycoords": "axes fraction"}
        ax.annotate(text, at, color=color, va="center", annotation_clip=False, **offset)
