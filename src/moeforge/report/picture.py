"""One PNG overview of a run, for a README."""

from __future__ import annotations

from pathlib import Path

from moeforge.report import draw
from moeforge.report.canvas import require_matplotlib, style
from moeforge.report.runs import Run, load_run
from moeforge.report.save import require_directory, save_figure
from moeforge.report.theme import light

_BY_LAYER = (
    ("drop_rate", "Token drop rate", True),
    ("aux_coef", "Auxiliary-loss coefficient α", True),
    ("max1_over_max2", "Gate: Max1 / Max2", False),
    ("expert_similarity", "Expert similarity", False),
)


def figure_png(run: Run | str | Path, path: str | Path) -> Path:
    """Draw six panels of a run (loss, drop rate, α, Max1/Max2, expert similarity, expert load) into a PNG.

    Dense runs show learning rate, gradient norm and speed in place of the routing.

    Raises:
        UserError: the run has no metrics, the directory of `path` does not exist, or no matplotlib.
        RunError: the disk is full; an earlier picture is kept.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    run = run if isinstance(run, Run) else load_run(run)
    path = Path(path)
    require_directory(path)
    palette = light()
    with matplotlib.rc_context(style(palette, size=10)):
        columns, rows = (3, 2) if run.layers else (2, 2)
        figure = Figure(figsize=(5 * columns, 3.1 * rows + 0.3), layout="constrained", facecolor=palette.surface)
        figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14, wspace=0.02, hspace=0.03)
        axes = list(figure.subplots(rows, columns).flat)
        draw.loss(axes[0], [run], palette)
        titles = ["Loss (line: train, dots: held-out)"]
        if run.layers:
            for ax, (key, title, zero) in zip(axes[1:5], _BY_LAYER, strict=True):
                draw.layers(ax, run, palette, key, zero=zero)
                titles.append(title)
            if run.load is not None:
                draw.load_map(axes[5], run, palette, palette)
            titles.append("Expert load: blue ½ of even, orange 2×")
        else:
            for ax, key in zip(axes[1:], ("lr", "grad_norm", "tokens_per_second"), strict=True):
                draw.scalar(ax, [run], palette, key, smoothed=key != "lr")
            titles += ["Learning rate", "Gradient norm", "Tokens a second"]
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, loc="left", fontsize="large", fontweight="bold", pad=10)
            if not ax.lines and not ax.images and not ax.collections:
                ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color=palette.muted)
        save_figure(figure, path, "png")
    return path
