"""Which query rows a strategy reads where its paper takes the last one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

RowsOrAuto = Annotated[
    Literal["auto", "last", "text", "instruction", "action"],
    Field(
        description="Query rows that are averaged; auto: `last` in a causal decoder, `text` in a bidirectional one.",
    ),
]


def rows_read(rows: RowsOrAuto, causal: bool) -> str:
    """The named rows: in a bidirectional decoder the last one is a stop token that means nothing."""
    if rows != "auto":
        return rows
    return "last" if causal else "text"


def rows_note(rows: RowsOrAuto, causal: bool) -> str:
    """What a stage tells about the rows it reads."""
    read = rows_read(rows, causal)
    instead = ", as in the released code" if read == "last" else " in place of the last one, which means nothing here"
    return f"attention of the '{read}' rows{instead if rows == 'auto' else ''}, mean over heads and rows"
