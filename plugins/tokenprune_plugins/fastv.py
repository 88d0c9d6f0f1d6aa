"""FastV (arXiv 2403.06764): drop once, after an early layer, the patches it attends to least.

The paper's K is the layer the cut comes before, so K = 2 is `after: 1`; its R is the pruned share, so R = 50 % is
`keep: 0.5`. The score is the attention map of layer K-1, averaged over heads. The released code takes the last query
row. In a bidirectional decoder the last row is a stop token that means nothing, so there the rows are the text's.
"""

from __future__ import annotations

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Probe,
    Proposal,
    Stage,
    TokenLayout,
    hookimpl,
    require_rows,
)
from tokenprune_plugins.shared.attention_rows import RowsOrAuto, rows_note, rows_read


class FastVConfig(CutConfig):
    """Where FastV cuts and whose attention it reads."""

    after: Cuts = (1,)
    keep: Keep = 0.5
    rows: RowsOrAuto = "auto"


class FastV(Stage[FastVConfig]):
    """Keeps the prunable tokens with the most attention from the chosen rows at the layer before the cut."""

    Config = FastVConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse rows that the decoder does not have beside the image."""
        require_rows(self.config.rows, info)

    def caveats(self, info: BackboneInfo) -> str:
        """Which rows are read on this backbone."""
        return rows_note(self.config.rows, info.decoder.causal)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The rows, at every layer a cut follows."""
        return tuple(
            Probe(layer, rows_read(self.config.rows, info.decoder.causal)) for layer in self.requirements(info).layers
        )

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Mean attention to each patch."""
        return Proposal(score=ctx.attention_rows(rows_read(self.config.rows, ctx.causal)).mean((1, 2)))
