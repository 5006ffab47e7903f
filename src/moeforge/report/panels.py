"""The panels of the page: a chart with its title, its legend and a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moeforge.report import draw
from moeforge.report.canvas import render
from moeforge.report.runs import Array, Run
from moeforge.report.theme import Palette, light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GATE_EVERY, SIMILARITY_EVERY = "run.gate_distribution_every", "run.similarity_every"


@dataclass(frozen=True)
class Key:
    """A legend entry: label, CSS colour, and how it is drawn ("line", "faint", "dots", "dashed")."""

    label: str
    color: str
    kind: str = "line"


@dataclass(frozen=True)
class Panel:
    """One card of the page. `ramp` names the ends of the layer colour scale, `scale` those of the load colours;
    `missing` says why there is no chart."""

    name: str
    title: str
    text: str
    svg: str = ""
    hover: dict[str, Any] = field(default_factory=dict)
    legend: tuple[Key, ...] = ()
    ramp: tuple[int, int] | None = None
    scale: tuple[str, str, str] | None = None
    wide: bool = False
    missing: str = ""


def training(runs: list[Run], x: str) -> list[Panel]:
    """Loss, learning rate, gradient norm and speed; several runs overlaid."""
    one = len(runs) == 1
    keys = tuple(Key(run.name, f"var(--series-{i % 8})") for i, run in enumerate(runs))
    first = keys[0].color
    loss_keys = (Key("train", first, "faint"), Key("smoothed", first), Key("held-out", first, "dots"))
    names = () if one else keys

    def panel(key: str, title: str, text: str, smoothed: bool) -> Panel:
        def paint(axes: list[Axes], palette: Palette) -> None:
            draw.scalar(axes[0], runs, palette, key, x, smoothed)

        return _chart(key, title, text, paint, _any(run[key] for run in runs), legend=names)

    def paint_loss(axes: list[Axes], palette: Palette) -> None:
        draw.loss(axes[0], runs, palette, x)

    held = "Dots are the held-out loss." if one else "Faint: every step; full: moving average; dots: held-out loss."
    known = _any(run[key] for run in runs for key in ("loss", "eval_loss"))
    legend = loss_keys if one else keys
    return [
        _chart("loss", "Loss", held, paint_loss, known, legend=legend, wide=True, height=300),
        panel("lr", "Learning rate", "As scheduled.", False),
        panel("grad_norm", "Gradient norm", "Before clipping, with its moving average.", True),
        panel("tokens_per_second", "Tokens a second", "Evaluation and checkpoints are not counted.", True),
    ]


def comparison(runs: list[Run], x: str) -> list[Panel]:
    """Balance and specialisation of several runs, each as its mean over layers."""
    keys = tuple(Key(run.name, f"var(--series-{i % 8})") for i, run in enumerate(runs) if run.layers)

    def panel(key: str, title: str, text: str, zero: bool = True) -> Panel:
        def paint(axes: list[Axes], palette: Palette) -> None:
            draw.layer_means(axes[0], runs, palette, key, x, zero)

        known = _any(run.by_layer[key] for run in runs)
        return _chart(f"mean-{key}", title, f"{text} Mean over layers.", paint, known, legend=keys)

    return [panel(key, title, text, zero) for key, title, text, zero in _BY_LAYER]


_BY_LAYER = (
    ("drop_rate", "Token drop rate", "Share of assignments beyond an expert's capacity.", True),
    ("aux_coef", "Auxiliary-loss coefficient α", "Follows the drop rate: high while experts are uneven.", True),
    ("max1_over_max2", "Max1 / Max2", "Largest over second gate probability; 1 is undecided.", False),
    ("max2_over_max3", "Max2 / Max3", "Second over third gate probability; 1 is undecided.", False),
    ("expert_similarity", "Expert similarity", "Mean pairwise cosine of the experts' weights; copies start at 1.", False),
)


def balance(run: Run, prefix: str, x: str) -> list[Panel]:
    """Figure 4: drop rate and α of every layer; then how evenly the experts are loaded."""
    panels = [_layers(run, prefix, x, *_BY_LAYER[0]), _layers(run, prefix, x, *_BY_LAYER[1])]

    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.load_spread(axes[0], run, palette, x)

    keys = (Key("mean over layers", "var(--series-0)"), Key("even", "var(--muted)", "dashed"))
    text = "The busiest expert's load over the mean. The band spans the best and the worst layer."
    known = _any([run.by_layer["load_max_over_mean"]])
    spread = _chart(f"{prefix}load_max_over_mean", "Busiest expert", text, paint, known, legend=keys)
    return [*panels, spread, load_map(run, prefix)]


def load_map(run: Run, prefix: str) -> Panel:
    """Layer by expert, at the end."""
    name, title = f"{prefix}load", "Expert load at the end"
    if run.load is None:
        return Panel(name, title, "", missing="No expert load was recorded in this run.")

    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.load_map(axes[0], run, palette, light())

    rows, experts = run.load.shape
    text = f"Against an even share of 1/{experts}; mean of the last {run.load_rows} steps."
    if run.load_rows == 1:
        text = f"Against an even share of 1/{experts}, at the last step."
    wide = rows * experts > 400
    svg, hover = render(name, paint, _WIDE if wide else _WIDTH, min(max(210, 60 + 11 * rows), 560))
    hover["cells"] = {"rows": list(run.layers), "values": np.round(run.load * experts, 3).tolist()}
    return Panel(name, title, text, svg, hover, scale=("¼ of even", "even", "4 × even"), wide=wide)


def gate(run: Run, prefix: str, x: str) -> list[Panel]:
    """Figures 2 and 3: how decided the gates are."""
    name, title = f"{prefix}gate_distribution", "Gate distribution"
    shown = draw.gate_layers(run)
    if not shown:
        missing = f"No gate distribution was recorded in this run ({GATE_EVERY})."
        distribution = Panel(name, title, "", missing=missing, wide=True)
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

        svg, hover = render(name, paint, _WIDE, 260, columns=len(shown))
        distribution = Panel(name, title, text, svg, hover, tuple(keys), wide=True)
    return [
        distribution,
        _layers(run, prefix, x, *_BY_LAYER[2]),
        _layers(run, prefix, x, *_BY_LAYER[3]),
    ]


def similarity(run: Run, prefix: str, x: str) -> Panel:
    """Figure 1: the experts drifting apart."""
    return _layers(run, prefix, x, *_BY_LAYER[4], hint=f" ({SIMILARITY_EVERY})", wide=True)


_WIDTH, _WIDE = 560, 1150


def _layers(
    run: Run, prefix: str, x: str, key: str, title: str, text: str, zero: bool, hint: str = "", wide: bool = False
) -> Panel:
    def paint(axes: list[Axes], palette: Palette) -> None:
        draw.layers(axes[0], run, palette, key, x, zero)

    ramp = (run.layers[0], run.layers[-1])
    known = _any([run.by_layer[key]])
    return _chart(f"{prefix}{key}", title, text, paint, known, ramp=ramp, hint=hint, wide=wide)


def _chart(
    name: str,
    title: str,
    text: str,
    paint: Callable[[list[Axes], Palette], None],
    known: bool,
    legend: tuple[Key, ...] = (),
    ramp: tuple[int, int] | None = None,
    hint: str = "",
    wide: bool = False,
    height: float = 250,
) -> Panel:
    if not known:
        return Panel(name, title, text, missing=f"Not recorded{hint}.", wide=wide)
    svg, hover = render(name, paint, _WIDE if wide else _WIDTH, height)
    hover["nearest"] = ramp is not None
    return Panel(name, title, text, svg, hover, legend, ramp, wide=wide)


def _any(arrays: Any) -> bool:
    values: list[Array] = list(arrays)
    return any(np.isfinite(array).any() for array in values)
