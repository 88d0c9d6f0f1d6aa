"""Draws success against latency, one labelled point per variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tokenprune.errors import ResultError
from tokenprune.evaluation.statistics import ALPHA
from tokenprune.viz.frame import FAINT, INK, MARK, plain, point_handle, write_chart, write_legend, write_title
from tokenprune.viz.labels import DPI, label_points

if TYPE_CHECKING:
    from tokenprune.evaluation.summary import Summary, VariantRow

_WIDTH, _HEIGHT = 1200, 750
_ALIKE, _DIFFERS = "#0072b2", "#d55e00"


def write_success(summary: Summary, path: Path) -> None:
    """Write the chart; an existing file is replaced, and equal summaries give equal files.

    Args:
        summary: What to draw, over all environments.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is not one of `FORMATS`, there is nothing to draw, or the file cannot be written.
    """
    write_chart(lambda: draw_success(summary), path)


def draw_success(summary: Summary) -> Figure:
    """Return a chart of success, with Wilson's 95 % interval, against the median latency of a query.

    Raises:
        ResultError: If no variant has finished an episode.
    """
    rows = [row for row in summary.at() if row.success_share is not None and row.query_ms_p50 is not None]
    if not rows:
        raise ResultError("there is nothing to draw: no variant has finished an episode")
    figure = Figure(figsize=(_WIDTH / DPI, _HEIGHT / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.085, 0.915, 0.815))
    colours = [_colour(row, summary.baseline) for row in rows]
    for row, colour in zip(rows, colours, strict=True):
        x, y = _point(row)
        axes.vlines(x, 100 * row.success_low, 100 * row.success_high, color=colour, alpha=0.45, linewidth=1.4)
        axes.plot(x, y, "o", color=colour, markersize=MARK, zorder=3)
    _frame(axes, rows)
    write_title(figure, 0.065, 0.96, "Success (95 % Wilson interval) and latency")
    _legend(figure, summary.baseline, set(colours))
    intervals = [(100 * row.success_low, 100 * row.success_high) for row in rows]
    label_points(axes, canvas, [_point(row) for row in rows], [row.variant for row in rows], colours, intervals)
    return figure


def _point(row: VariantRow) -> tuple[float, float]:
    if row.success_share is None or row.query_ms_p50 is None:
        raise ValueError(f"'{row.variant}' has no episode")
    return row.query_ms_p50, 100 * row.success_share


def _colour(row: VariantRow, baseline: str | None) -> str:
    if row.variant == baseline:
        return INK
    return _DIFFERS if row.paired is not None and row.paired.p < ALPHA else _ALIKE


def _frame(axes: Axes, rows: list[VariantRow]) -> None:
    """Set limits with room for labels, and the style of the axes."""
    xs = [_point(row)[0] for row in rows]
    room = 0.12 * (max(xs) - min(xs)) or 0.2 * xs[0]
    low = 100 * min(row.success_low for row in rows)
    high = 100 * max(row.success_high for row in rows)
    axes.set(
        xlim=(max(0, min(xs) - room), max(xs) + room),
        ylim=(max(-5, low - 0.1 * (high - low)), min(112, high + 0.15 * (high - low))),
    )
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100 and tick > axes.get_ylim()[0]])
    axes.set_xlabel("median query (ms)", fontsize=10, color=FAINT)
    axes.set_ylabel("success (%)", fontsize=10, color=FAINT)
    plain(axes)


def _legend(figure: Figure, baseline: str | None, used: set[str]) -> None:
    """Explain the colours that occur."""
    if baseline is None:
        return
    meaning = {
        INK: baseline,
        _ALIKE: f"no difference from {baseline} seen",
        _DIFFERS: f"differs from {baseline}, p < {ALPHA:g}",
    }
    handles = [point_handle(colour, text) for colour, text in meaning.items() if colour in used]
    write_legend(figure, handles, 0.96, gap=0.2)
