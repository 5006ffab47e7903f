"""Colours of the report. Charts are drawn once, in placeholder colours that become CSS variables in the page.

matplotlib writes every colour of an SVG as `#rrggbb` inside a style attribute, where `var(--name)` may stand
too. So one drawing follows the reader's light or dark setting, and the PNG picture uses the same palette.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RAMP_STEPS = 32


@dataclass(frozen=True)
class Palette:
    """Named colours (`#rrggbb`); `series` are for runs and kinds, `ramp` goes from first to last layer."""

    ink: str
    muted: str
    grid: str
    surface: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]

    def run(self, index: int) -> str:
        """The colour of the index-th run; they repeat after `len(series)`."""
        return self.series[index % len(self.series)]

    def layer(self, position: int, count: int) -> str:
        """The colour of the position-th of `count` layers."""
        return self.ramp[round(position / max(count - 1, 1) * (len(self.ramp) - 1))]

    def variables(self) -> dict[str, str]:
        """CSS custom properties (name without dashes -> colour)."""
        named = {"ink": self.ink, "muted": self.muted, "grid": self.grid, "surface": self.surface}
        named |= {f"series-{i}": color for i, color in enumerate(self.series)}
        return named | {f"ramp-{i}": color for i, color in enumerate(self.ramp)}


def _ramp(low: float, high: float) -> tuple[str, ...]:
    """Viridis between two lightness limits, so that no end of it fades into the background."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    steps = [low + (high - low) * i / (RAMP_STEPS - 1) for i in range(RAMP_STEPS)]
    return tuple(to_hex(colormaps["viridis"](step)) for step in steps)


def light() -> Palette:
    """On white."""
    series = ("#2a6fcf", "#d9622b", "#14946a", "#7a5cc9", "#c2447f", "#8a6d00", "#4b7a1f", "#5b6b7c")
    return Palette("#1d2127", "#667080", "#e7e9ec", "#ffffff", series, _ramp(0.0, 0.78))


def dark() -> Palette:
    """On near black."""
    series = ("#5b9df0", "#ee8350", "#35b88a", "#a48ef0", "#e873a9", "#cfa62b", "#85b858", "#9aa7b5")
    return Palette("#e8eaed", "#98a1ad", "#2c3036", "#191b1f", series, _ramp(0.34, 1.0))


def placeholders() -> Palette:
    """Colours that stand for CSS variables; `themed` replaces them."""
    return Palette(
        "#fe0001",
        "#fe0002",
        "#fe0003",
        "#fe0004",
        tuple(f"#fe01{i:02x}" for i in range(8)),
        tuple(f"#fe02{i:02x}" for i in range(RAMP_STEPS)),
    )


def themed(svg: str) -> str:
    """The drawing with every placeholder colour replaced by its CSS variable."""
    names = placeholders().variables()
    by_color = {color: name for name, color in names.items()}
    return re.sub(r"#fe0[0-2][0-9a-f]{2}", lambda match: f"var(--{by_color[match[0]]})", svg)
