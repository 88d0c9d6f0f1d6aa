"""FastV (arXiv 2403.06764): after an early layer, drop the patches that get the least attention in it.

The paper's K is the layer that the cut precedes, so K = 2 is `after: 1`; its R is the pruned share, so R = 50 % is
`keep: 0.5`. The score is the attention of layer K-1, mean over heads. The released code reads the last query row. In a
bidirectional decoder the last row has no special role, so there the text's rows are read.
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
from tokenprune_plugins.shared.attention_rows import RowsOrAuto, attention_to_patches, resolve_rows, rows_caveat


class FastVConfig(CutConfig):
    """Where FastV cuts and whose attention it reads."""

    after: Cuts = (1,)
    keep: Keep = 0.5
    rows: RowsOrAuto = "auto"


class FastV(Stage[FastVConfig]):
    """Keeps the patches that get the most attention from the chosen rows at the layer before the cut."""

    Config = FastVConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse rows that the decoder does not process together with the image."""
        require_rows(self.config.rows, info)

    def caveats(self, info: BackboneInfo) -> str:
        """Which rows are read on this backbone."""
        return rows_caveat(self.config.rows, info.decoder.causal)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The resolved rows at every layer that a cut follows."""
        rows = resolve_rows(self.config.rows, info.decoder.causal)
        return tuple(Probe(layer, rows) for layer in self.requirements(info).layers)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Score patches by their attention from the rows."""
        return Proposal(score=attention_to_patches(ctx, resolve_rows(self.config.rows, ctx.causal)))
