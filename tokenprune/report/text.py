"""Text that fits a terminal of 80 columns."""

from __future__ import annotations

WIDTH = 80
NAME_WIDTH = 15
"""Characters of the column that holds a pipeline's name."""


def broken(name: str) -> str:
    """A long name is broken between its parts rather than in a word."""
    if len(name) <= NAME_WIDTH:
        return name
    name, at, settings = name.partition("@")
    short = name if len(name) <= NAME_WIDTH else name.replace(".", ".\n", 1)
    return "\n".join([short, *((at + settings).split(",") if at else ())])


def milliseconds(value: float) -> str:
    """Four characters: milliseconds, or seconds where those do not fit."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}" if value < 9999.5 else f"{value / 1e3:.0f}s"
