"""Attention rows that strategies read, and which ones where the paper takes the last."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tokenprune import LayerContext, OriginalIds

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


def attention_to_patches(ctx: LayerContext, rows: str | range | OriginalIds) -> Tensor:
    """Attention of some queries to the held patches, mean over heads and rows `[B, P]`."""
    return ctx.attention_rows(rows).mean((1, 2))
