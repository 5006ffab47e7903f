"""From matplotlib axes to an inline SVG that follows the page's theme, and what its hover script needs.

matplotlib is imported when the first chart is drawn, and its global state is never touched.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moeforge.errors import UserError
from moeforge.report.theme import Palette, placeholders, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def require_matplotlib() -> None:
    """Raises UserError with the command that installs it where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("report: matplotlib is not installed, which draws the charts; pip install 'moeforge[report]'")


def style(palette: Palette, size: float = 11.5) -> dict[str, Any]:
    """The matplotlib settings of every chart, for `rc_context`."""
    return {
        "figure.dpi": 72,
        "font.size": size,
        "axes.facecolor": "none",
        "axes.edgecolor": palette.grid,
        "axes.labelcolor": palette.muted,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.xmargin": 0.0,
        "axes.ymargin": 0.06,
        "grid.color": palette.grid,
        "grid.linewidth": 1.0,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "xtick.major.pad": 7,
        "ytick.major.pad": 6,
        "text.color": palette.ink,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "path.simplify": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "moeforge",
        "text.parse_math": False,
    }


def render(
    name: str,
    draw: Callable[[list[Axes], Palette], None],
    width: float = 560,
    height: float = 250,
    columns: int = 1,
) -> tuple[str, dict[str, Any]]:
    """Draw a chart of `columns` axes side by side and return (svg, hover data).

    `width` and `height` are in CSS pixels. `name` prefixes every id in the SVG, so that a page may hold many.
    Lines named by `hoverable` can be pointed at.
    """
    import matplotlib
    from matplotlib.figure import Figure

    palette = placeholders()
    with matplotlib.rc_context(style(palette)):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.get_layout_engine().set(w_pad=2 / 72, h_pad=2 / 72, wspace=0.05)
        axes = list(figure.subplots(1, columns, sharey=columns > 1, squeeze=False)[0])
        draw(axes, palette)
        series = [_name_lines(axis, f"{name}-line-{i}") for i, axis in enumerate(axes)]
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),  # no metadata block, same bytes each time
        )
        areas = [_area(axis, height) | {"series": s} for axis, s in zip(axes, series, strict=True)]
    return _clean(buffer.getvalue(), name), {"width": width, "height": height, "axes": areas}


def hoverable(line: Line2D, label: str) -> None:
    """Let the page's hover script find this line, and say how it is called there."""
    line.set_gid("hover")
    line.set_label(label)


def compact(value: float) -> str:
    """A number for a reader: 1.2M, 45k, 0.0312, 3.1e-05; `–` for NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if value == int(value):
        return str(int(value))
    if 0.99 < abs(value) < 1:  # similarities: what they lack to 1 is what there is to read
        return f"{value:.{min(1 - math.floor(math.log10(1 - abs(value))), 12)}f}".rstrip("0")
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def rounded(value: float) -> str:
    """`compact` of three significant digits, or of all where they are what counts (just below 1)."""
    return compact(value if 0.99 < abs(value) < 1 else float(f"{value:.3g}"))


def _name_lines(axis: Axes, prefix: str) -> list[dict[str, str]]:
    """Give every hoverable line an id of its own and tell the page about it."""
    series = []
    for number, line in enumerate(axis.lines):
        if line.get_gid() == "hover":
            line.set_gid(f"{prefix}-{number}")
            color = themed(str(line.get_color()))
            series.append({"id": f"{prefix}-{number}", "label": str(line.get_label()), "color": color})
    return series


def _area(axis: Axes, height: float) -> dict[str, Any]:
    """Where the axes lie (x, y, width, height from the top left, in pixels) and what they span."""
    box = axis.get_window_extent()
    return {
        "box": [round(float(v), 2) for v in (box.x0, height - box.y1, box.width, box.height)],
        "x": [float(v) for v in axis.get_xlim()],
        "y": [float(v) for v in axis.get_ylim()],
        "log": axis.get_yscale() == "log",
        "xname": axis.get_xlabel(),
    }


def _clean(svg: str, name: str) -> str:
    """Only the svg element: themed colours, the ids that matter made unique, no name spaces, two decimals."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.S)
    svg = re.sub(rf'<g id="(?!{name}-line)[^"]*"', "<g", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)(?!' + name + "-line)", rf"\g<1>{name}-", svg)
    svg = re.sub(r' font-family: [^;"]*;', "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)  # never in the text
    svg = re.sub(r" \n(?=[MLCz\"])", "", svg)
    svg = re.sub(r"\n\s*(?=<)", "", svg.strip())
    svg = re.sub(r"<g\s*/>|<defs></defs>", "", svg)
    return themed(svg)
