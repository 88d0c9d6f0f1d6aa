"""FastV (arXiv 2403.06764): drop once, after an early layer, the patches it attends to least.

The paper's K is the layer the cut comes before, so K = 2 is `after: 1`; its R is the pruned share, so R = 50 % is
`keep: 0.5`. The score is the attention map of layer K-1, averaged over heads. The released code takes the last query
row. In a bidirectional decoder the last row is a stop token that means nothing, so there the rows are the text's.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenprune.backbone import BackboneInfo
from tokenprune.config import CutConfig, Cuts, Keep
from tokenprune.context import LayerContext
from tokenprune.hookspecs import hookimpl
from tokenprune.layout import TokenLayout
from tokenprune.selection import Proposal
from tokenprune.stage import Stage, require_rows


class FastVConfig(CutConfig):
    """Where FastV cuts and whose attention it reads."""

    after: Cuts = (1,)
    keep: Keep = 0.5
    rows: Literal["auto", "last", "text", "instruction", "action"] = Field(
        default="auto",
        description="Query rows that are averaged; auto: `last` in a causal decoder, `text` in a bidirectional one.",
    )


class FastV(Stage[FastVConfig]):
    """Keeps the prunable tokens with the most attention from the chosen rows at the layer before the cut."""

    Config = FastVConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse rows that the decoder does not have beside the image."""
        require_rows(self.config.rows, info)

    def notes(self, info: BackboneInfo) -> str:
        """Which rows are read on this backbone."""
        rows = self._rows(info.decoder.causal)
        instead = (
            ", as in the released code" if rows == "last" else " in place of the last one, which means nothing here"
        )
        return (
            f"attention of the '{rows}' rows{instead if self.config.rows == 'auto' else ''}, mean over heads and rows"
        )

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[tuple[int, str | range], ...]:
        """The rows, at every layer a cut follows."""
        return tuple((layer, self._rows(info.decoder.causal)) for layer in self.layers(info.decoder.depth))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Mean attention to each patch."""
        return Proposal(score=ctx.attention_rows(self._rows(ctx.causal)).mean((1, 2)))

    def _rows(self, causal: bool) -> str:
        if self.config.rows != "auto":
            return self.config.rows
        return "last" if causal else "text"
