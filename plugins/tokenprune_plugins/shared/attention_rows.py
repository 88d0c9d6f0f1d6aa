"""Which query rows a strategy's attention is read from, and their mean attention to the patches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tokenprune import LayerContext, OriginalIds

RowsOrAuto = Annotated[
    Literal["auto", "last", "text", "instruction", "action"],
    Field(
        description="Query rows whose attention is averaged; auto: `last` in a causal decoder, `text` in a "
        "bidirectional one.",
    ),
]


def resolve_rows(rows: RowsOrAuto, causal: bool) -> str:
    """Name of the span whose rows are read; for `auto` this is the last row only in a causal decoder."""
    if rows != "auto":
        return rows
    return "last" if causal else "text"


def rows_caveat(rows: RowsOrAuto, causal: bool) -> str:
    """Text for `Stage.caveats`: which rows are read, and whether the released code reads others."""
    resolved = resolve_rows(rows, causal)
    released = ", as in the released code" if causal else " in place of the last one, which has no special role here"
    return f"attention of the '{resolved}' rows{released if rows == 'auto' else ''}, mean over heads and rows"


def attention_to_patches(ctx: LayerContext, rows: str | range | OriginalIds) -> Tensor:
    """Attention of query rows to the prunable tokens held now, mean over heads and rows `[B, P]`."""
    return ctx.attention_rows(rows).mean((1, 2))
