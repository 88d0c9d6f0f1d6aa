"""What all charts share: colours of text, plain axes, title and legend, and how they become files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokenprune.errors import ResultError

FORMATS = (".png", ".svg")
INK, FAINT = "#222222", "#666666"
MARK = 6
"""Diameter of a point, in points of 1/72 inch."""


def check_format(path: Path) -> None:
    """Refuse a file name that is no chart's.

    Raises:
        ResultError: If its ending is not one of `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ResultError(f"cannot draw '{path}': its ending is '{path.suffix}'; valid: {', '.join(FORMATS)}")


def write_chart(draw: Callable[[], Figure], path: Path) -> None:
    """Write a chart; an existing file is replaced, and equal figures give equal files.

    Args:
        draw: Makes the figure; called after the file's ending was checked.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is not one of `FORMATS`, or the file cannot be written.
    """
    check_format(path)
    figure = draw()
    # Text stays text, so that labels can be searched for and edited.
    with rc_context({"svg.hashsalt": "tokenprune", "svg.fonttype": "none"}):
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error.strerror or error}") from error


def plain(axes: Axes) -> None:
    """Give axes small ticks, a faint grid behind, and no frame above or to the right."""
    axes.tick_params(labelsize=9, colors=FAINT, length=3)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def write_title(figure: Figure, x: float, y: float, title: str) -> None:
    """Write the title of a figure at figure coordinates."""
    figure.text(x, y, title, fontsize=12, va="center", color=INK, fontweight="bold")


def point_handle(colour: str, label: str) -> Line2D:
    """Return the legend's entry for points of a colour."""
    return Line2D([], [], marker="o", linestyle="", color=colour, markersize=MARK, label=label)


def write_legend(figure: Figure, handles: Sequence[Line2D], y: float, gap: float) -> None:
    """Write the legend in one line at the upper right.

    Args:
        figure: Where.
        handles: Its entries.
        y: Height of its middle, in figure coordinates.
        gap: Space between a mark and its text, in font sizes.
    """
    legend = figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(0.985, y), ncols=len(handles), frameon=False, fontsize=9.5,
        labelcolor=INK, borderpad=0, handletextpad=gap,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
