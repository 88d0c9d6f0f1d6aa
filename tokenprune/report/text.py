"""Tables and numbers that fit a terminal of 80 columns."""

from __future__ import annotations

import re

from rich import box
from rich.table import Table

WIDTH = 80
NAME_WIDTH = 15
"""Characters of the column that holds a pipeline's name."""

_LABEL_PARTS = re.compile(r"(?=[@+])|(?=\.\D)|(?<=,)")


def result_table(name_heading: str, *headings: str, min_width: int = NAME_WIDTH, max_width: int | None = None) -> Table:
    """Return an empty table: a column of names, then columns of numbers.

    Args:
        name_heading: Heading of the first column.
        *headings: Of the columns of numbers.
        min_width: Characters of the first column.
        max_width: Most characters of the first column; as many as its longest word when None.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column(name_heading, overflow="fold", min_width=min_width, max_width=max_width)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def wrap_label(label: str, width: int = NAME_WIDTH) -> str:
    """Return a pipeline's label in lines of at most `width` characters, broken before `@`, `+` or `.`, or after `,`."""
    lines = [""]
    for part in _LABEL_PARTS.split(label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    """Return four characters: milliseconds, or seconds where those do not fit."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}" if value < 9999.5 else f"{value / 1e3:.0f}s"
