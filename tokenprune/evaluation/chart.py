"""Draws success against latency, one labelled point per variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokenprune.errors import ResultError
from tokenprune.evaluation.statistics import ALPHA
from tokenprune.viz.frame import FAINT, INK, plain, write_chart
from tokenprune.viz.labels import DPI, MARK, label_points

if TYPE_CHECKING:
    from tokenprune.evaluation.summary import Row, Summary

_WIDTH, _HEIGHT = 1200, 750


_UNSEEN, _SEEN = "#0072b2", "#d55e00"


def write_success(summary: Summary, path: Path) -> None:
    """Write the chart; a file of that name is replaced, and equal summaries give equal files.

    Args:
        summary: What to draw, over all environments.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is another one, there is nothing to draw, or the file cannot be written.
    """
    write_chart(lambda: draw_success(summary), path)


def draw_success(summary: Summary) -> Figure:
    """Success with Wilson's 95 % interval against the median latency of a query, over all environments.

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
    figure.text(
        0.065,
        0.96,
        "Success (95 % Wilson interval) and latency",
        fontsize=12,
        va="center",
        color=INK,
        fontweight="bold",
    )
    _key(figure, summary.baseline, set(colours))
    intervals = [(100 * row.success_low, 100 * row.success_high) for row in rows]
    label_points(axes, canvas, [_point(row) for row in rows], [row.variant for row in rows], colours, intervals)
    return figure


def _point(row: Row) -> tuple[float, float]:
    if row.success_share is None or row.query_ms_p50 is None:
        raise ValueError(f"'{row.variant}' has no episode")
    return row.query_ms_p50, 100 * row.success_share


def _colour(row: Row, baseline: str | None) -> str:
    if row.variant == baseline:
        return INK
    return _SEEN if row.paired is not None and row.paired.p < ALPHA else _UNSEEN


def _frame(axes: Axes, rows: list[Row]) -> None:
    """Limits with room for labels, and axes as plain as those of the other pictures."""
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


def _key(figure: Figure, baseline: str | None, used: set[str]) -> None:
    """What the colours say."""
    if baseline is None:
        return
    meaning = {
        INK: baseline,
        _UNSEEN: f"no difference from {baseline} seen",
        _SEEN: f"differs from {baseline}, p < {ALPHA:g}",
    }
    marks = {said: colour for colour, said in meaning.items() if colour in used}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=MARK, label=said)
        for said, colour in marks.items()
    ]
    key = figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(0.985, 0.96), ncols=3, frameon=False, fontsize=9.5,
        labelcolor=INK, borderpad=0, handletextpad=0.2,
    )  # fmt: skip
    for text in key.get_texts():
        text.set_parse_math(False)
