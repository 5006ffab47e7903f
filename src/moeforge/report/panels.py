"""The panels of the page: a chart with its title, its legend and a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moeforge.report import draw
from moeforge.report.canvas import render
from moeforge.report.runs import Array, Run
from moeforge.report.theme import Palette, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GATE_EVERY, SIMILARITY_EVERY = "run.gate_distribution_every", "run.similarity_every"


Size = Literal["third", "half", "two-thirds", "wide"]
_WIDTHS: dict[Size, float] = {"third": 372, "half": 560, "two-thirds": 760, "wide": 1150}
_HEIGHTS: dict[Size, float] = {"third": 220, "half": 250, "two-thirds": 250, "wide": 250}


@dataclass(frozen=True)
class Key:
    """A legend entry: label, CSS colour, and how it is drawn ("line", "faint", "dots", "dashed")."""

    label: str
    color: str
    kind: str = "line"


@dataclass(frozen=True)
class Panel:
    """One card of the page.

    `ramp` names the ends of the layer colour scale, `scale` those of the load colours; `missing` says why
    there is no chart."""

    name: str
    title: str
    text: str
    svg: str = ""
    hover: dict[str, Any] = field(default_factory=dict)
    legend: tuple[Key, ...] = ()
    ramp: tuple[int, int] | None = None
    scale: tuple[str, str] | None = None
    size: Size = "half"
    missing: str = ""


def training(runs: list[Run], x: str) -> list[Panel]:
    """Loss, learning rate, gradient norm and speed; several runs overlaid."""
    one = len(runs) == 1
    keys = tuple(Key(run.name, f"var(--series-{i % 8})") for i, run in enumerate(runs))
    first = keys[0].color
    loss_keys = (
        Key("train", first, "faint"),
        Key("smoothed", first),
        Key("held-out", "var(--series-1)", "dots"),
    )
    names = () if one else keys

    def panel(key: str, title: str, text: str, smoothed: bool) -> Panel:
        def paint(axes: list[Axes], palette: Palette) -> None:
            draw.scalar(axes[0], runs, palette, key, x, smoothed)

        return _chart(key, title, text, paint, _any(run[key] for run in runs), legend=names, size="third", height=220)

    def paint_loss(axes: list[Axes], palette: Palette) -> None:
        draw.loss(axes[0], runs, palette, x)

    held = (
        "Faint: every step; full: moving average."
        if one
        else "Faint: every step; full: moving average; dots: held-out loss."
    )
    known = _any(run[key] for run in runs for key in ("loss", "eval_loss"))
    legend = loss_keys if one else keys
    return [
        _chart("loss", "Loss", held, paint_loss, known, legend=legend, size="wide", height=300),
        panel("lr", "Learning rate", "As scheduled.", False),
        panel("grad_norm", "Gradient norm", "Before clipping, with its moving average.", True),
        panel("tokens_per_second", "Tokens a second", "Evaluation and checkpoints are not counted.", True),
    ]


def comparison(runs: list[Run], x: str) -> list[Panel]:
    """Balance and specialisation of several runs, each as its mean over layers."""
    keys = tuple(Key(run.name, f"var(--series-{i % 8})") for i, run in enumerate(runs) if run.layers)

    def panel(key: str, title: str, text: str, zero: bool, size: Size) -> Panel:
        def paint(axes: list[Axes], palette: Palette) -> None:
            draw.layer_means(axes[0], runs, palette, key, x, zero)

        known = _any(run.by_layer[key] for run in runs)
        return _chart(f"mean-{key}", title, text, paint, known, legend=keys, size=size, height=_HEIGHTS[size])

    sizes: tuple[Size, ...] = ("half", "half", "third", "third", "third")
    return [panel(*entry, size=size) for entry, size in zip(_BY_LAYER, sizes, strict=True)]


_BY_LAYER = (
    ("drop_rate", "Token drop rate", "Share of assignments beyond an expert's capacity.", True),
    (
        "aux_coef",
        "Auxiliary-loss coefficient α",
        "Follows the drop rate: high while experts are uneven.",
        True,
    ),
    ("max1_over_max2", "Max1 / Max2", "Largest over second gate probability; 1 is undecided.", False),
    ("max2_over_max3", "Max2 / Max3", "Second over third gate probability; 1 is undecided.", False),
    (
        "expert_similarity",
        "Expert similarity",
        "Mean pairwise cosine of the experts' weights; copies start at 1.",
        False,
    ),
)


def balance(run: Run, prefix: str, x: str) -> list[Panel]:
    """Figure 4: drop rate and α of every layer; then how evenly the experts are loaded."""
    panels = [_layers(run, prefix, x, *_BY_LAYER[0]), _layers(run, prefix, x, *_BY_LAYER[1])]

    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.load_spread(axes[0], run, palette, x)

    keys = (Key("mean over layers", "var(--series-0)"), Key("even", "var(--muted)", "dashed"))
    text = "The busiest expert's load over the mean load; the band spans all layers. Moving averages."
    known = _any([run.by_layer["load_max_over_mean"]])
    many = run.load is not None and run.load.shape[1] > _MANY_EXPERTS
    size: Size = "wide" if many else "third"
    height = 240 if many else 260
    spread = _chart(
        f"{prefix}load_max_over_mean",
        "Busiest expert",
        text,
        paint,
        known,
        legend=keys,
        size=size,
        height=height,
    )
    return [*panels, spread, load_map(run, prefix)]


def load_map(run: Run, prefix: str) -> Panel:
    """Expert by layer, at the end."""
    name, title = f"{prefix}load", "Expert load at the end"
    if run.load is None:
        return Panel(name, title, "", missing="No expert load was recorded in this run.")

    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.load_map(axes[0], run, palette, light())

    experts = run.load.shape[1]
    text = f"Against an even share of 1/{experts}; mean of the last {run.load_rows} steps."
    if run.load_rows == 1:
        text = f"Against an even share of 1/{experts}, at the last step."
    many = experts > _MANY_EXPERTS
    size: Size = "wide" if many else "two-thirds"
    svg, hover = render(name, paint, _WIDTHS[size], 60 + 8 * experts if many else 260)
    hover["cells"] = {"layers": list(run.layers), "values": np.round(run.load * experts, 3).tolist()}
    return Panel(name, title, text, svg, hover, scale=("½ of even", "2 ×"), size=size)


def gate(run: Run, prefix: str, x: str) -> list[Panel]:
    """Figures 2 and 3: how decided the gates are."""
    name, title = f"{prefix}gate_distribution", "Gate distribution"
    shown = draw.gate_layers(run)
    if not shown:
        missing = f"No gate distribution was recorded in this run ({GATE_EVERY})."
        distribution = Panel(name, title, "", missing=missing, size="wide")
    else:
        text = "Mean gate probability of each token's experts, sorted from the largest. The dashed line is 1/E."
        both = draw.gate_is_normalised(run)
        keys = [Key("with normalisation" if both else "gate", "var(--series-0)")]
        if both:
            keys.append(Key("same logits without", "var(--series-1)"))
        if len(run.gates) > 1:
            keys.append(Key(f"faint: step {run.gates[0].step}", "var(--muted)", "faint"))
            keys.append(Key(f"full: step {run.gates[-1].step}", "var(--muted)"))

        def paint(axes: list[Axes], palette: Palette) -> None:
            draw.gates(axes, run, palette)

        svg, hover = render(name, paint, _WIDTHS["wide"], 260, columns=len(shown))
        distribution = Panel(name, title, text, svg, hover, tuple(keys), size="wide")
    return [
        distribution,
        _layers(run, prefix, x, *_BY_LAYER[2]),
        _layers(run, prefix, x, *_BY_LAYER[3]),
    ]


def similarity(run: Run, prefix: str, x: str) -> Panel:
    """Figure 1: the experts drifting apart."""
    return _layers(run, prefix, x, *_BY_LAYER[4], hint=f" ({SIMILARITY_EVERY})", size="wide")


_MANY_EXPERTS = 24
"""More do not fit beside another chart."""


def _layers(
    run: Run,
    prefix: str,
    x: str,
    key: str,
    title: str,
    text: str,
    zero: bool,
    hint: str = "",
    size: Size = "half",
) -> Panel:
    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.layers(axes[0], run, palette, key, x, zero)

    ramp = (run.layers[0], run.layers[-1])
    known = _any([run.by_layer[key]])
    steps = draw.layer_smoothing(key, int(np.isfinite(run.by_layer[key]).any(axis=1).sum()))
    text += f" Moving average, {steps} steps." if steps > 1 else ""
    return _chart(f"{prefix}{key}", title, text, paint, known, ramp=ramp, hint=hint, size=size)


def _chart(
    name: str,
    title: str,
    text: str,
    paint: Callable[[list[Axes], Palette], None],
    known: bool,
    legend: tuple[Key, ...] = (),
    ramp: tuple[int, int] | None = None,
    hint: str = "",
    size: Size = "half",
    height: float = 250,
) -> Panel:
    if not known:
        return Panel(name, title, text, missing=f"Not recorded{hint}.", size=size)
    svg, hover = render(name, paint, _WIDTHS[size], height)
    hover["nearest"] = ramp is not None
    return Panel(name, title, text, svg, hover, legend, ramp, size=size)


def _any(arrays: Any) -> bool:
    values: list[Array] = list(arrays)
    return any(np.isfinite(array).any() for array in values)
