"""What all charts have in common: colours of text, plain axes, and how they become files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.errors import ResultError

FORMATS = (".png", ".svg")
INK, FAINT = "#222222", "#666666"


def check_format(path: Path) -> None:
    """Refuse a file that no chart can become.

    Raises:
        ResultError: If its ending is another one than a chart can have.
    """
    if path.suffix not in FORMATS:
        raise ResultError(f"cannot draw '{path}': its ending is '{path.suffix}'; valid: {', '.join(FORMATS)}")


def write_chart(draw: Callable[[], Figure], path: Path) -> None:
    """Write a chart; a file of that name is replaced, and equal figures give equal files.

    Args:
        draw: Makes the figure, once the file's ending is known to be right.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is another one, or the file cannot be written.
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
    """Small ticks, a faint grid behind, and no frame above or to the right."""
    axes.tick_params(labelsize=9, colors=FAINT, length=3)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
