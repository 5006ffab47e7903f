"""What a sweep over device counts found: speed, utilisation, bubble and memory in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeforge.errors import UserError
from moeforge.report.canvas import compact, require_matplotlib, style
from moeforge.report.runs import Array
from moeforge.report.save import picture_format, save_figure
from moeforge.report.theme import Palette, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, float | None]


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Draw four panels over `devices` into an SVG or a PNG, as the suffix of `path` says.

    A row has `devices`, `tokens_per_second_per_gpu` and `uniform_tokens_per_second_per_gpu` (the plan with even
    stages), `mfu`, `bubble_fraction` and `peak_memory_bytes` and, where there is a limit, `memory_cap_bytes`; what is
    None or missing is left out. The picture appears whole or not at all.

    Raises UserError for no rows, another suffix, a missing directory or no matplotlib, RunError for a full disk.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    form = picture_format(path)
    if not rows:
        raise UserError("sweep: no rows; give at least one number of devices")
    rows = sorted(rows, key=lambda row: row["devices"] or 0)
    palette = light()
    with matplotlib.rc_context(style(palette, size=10)):
        figure = Figure(figsize=(10, 6.6), layout="constrained", facecolor=palette.surface)
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14, wspace=0.04, hspace=0.03)
        axes = list(figure.subplots(2, 2, sharex=True).flat)
        speeds = {"planned": "tokens_per_second_per_gpu", "even stages": "uniform_tokens_per_second_per_gpu"}
        _panel(axes[0], "Tokens a second and GPU", rows, speeds, 1, palette)
        _panel(axes[1], "Model FLOPs utilisation, %", rows, {"planned": "mfu"}, 100, palette)
        _panel(axes[2], "Pipeline bubble, %", rows, {"planned": "bubble_fraction"}, 100, palette)
        memory = {"planned": "peak_memory_bytes", "limit": "memory_cap_bytes"}
        _panel(axes[3], "Peak memory of a GPU, GiB", rows, memory, 2.0**-30, palette)
        for ax in axes[2:]:
            _device_axis(ax, _values(rows, "devices"))
        save_figure(figure, path, form)


_LINES = {
    "planned": (0, {"marker": "o", "markersize": 5}),
    "even stages": (1, {"marker": "o", "markersize": 5, "linestyle": (0, (4, 2))}),
    "limit": (None, {"linestyle": (0, (2, 2)), "linewidth": 1.2}),
}
"""Colour (of the palette's series, None: muted) and look of each line."""


def _panel(ax: Axes, title: str, rows: Sequence[Row], lines: Mapping[str, str], scale: float, palette: Palette) -> None:
    devices, highest = _values(rows, "devices"), 0.0
    ax.set_xscale("log", base=2)
    for name, key in lines.items():
        values = _values(rows, key) * scale
        known = np.isfinite(values)
        if not known.any():
            continue
        number, look = _LINES[name]
        color = palette.muted if number is None else palette.series[number]
        (line,) = ax.plot(devices[known], values[known], color=color, label=name, **look)
        line.set_gid(key.replace("_", "-"))
        highest = max(highest, float(values[known].max()))
    ax.set_ylim(0, 1.12 * highest or 1)
    ax.set_title(title, loc="left", fontsize="large", fontweight="bold", pad=10)
    if len(ax.lines) > 1:
        ax.legend(loc="lower left", frameon=False, ncols=2, handlelength=2.4)
    if not ax.lines:
        ax.text(0.5, 0.5, "not known", transform=ax.transAxes, ha="center", color=palette.muted)


def _device_axis(ax: Axes, devices: Array) -> None:
    """Ticks at the counts themselves, as many of them as can be read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    counts = np.unique(devices)
    step = -(-len(counts) // 10)
    ax.set_xlim(counts[0] / 1.15, counts[-1] * 1.15)
    ax.xaxis.set_major_locator(FixedLocator(counts[::-step][::-1].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(round(value))))
    ax.set_xlabel("devices")


def _values(rows: Sequence[Row], key: str) -> Array:
    """[R], NaN where a row has none."""
    found = (row.get(key) for row in rows)
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)
