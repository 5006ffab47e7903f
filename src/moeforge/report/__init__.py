"""What a run looks like: one self-contained HTML page, or one picture. matplotlib is loaded only to draw."""

from moeforge.report.page import write_report
from moeforge.report.picture import figure_png
from moeforge.report.runs import Run, load_run

__all__ = ["Run", "figure_png", "load_run", "write_report"]
