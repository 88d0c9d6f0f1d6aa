"""PyramidDrop (arXiv 2410.17247): drop half of the patches at each of three depths.

Before layers 8, 16 and 24 of 32 the score of a patch is the attention that the last token would pay it in the next
layer, computed with that layer's norm and projections, mean over heads; 50, 25 and 12.5 % of all patches are left. The
released code renumbers the kept tokens (`positions: compact`), and so does the preset. In a bidirectional decoder the
last row has no special role, so there the text's rows are read.
"""

from __future__ import annotations

from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Cuts, Keep, Probe, SelectContext, TokenLayout, require_rows
from tokenprune_plugins.shared.attention_rows import RowsOrAuto, resolve_rows, rows_caveat
from tokenprune_plugins.shared.bases import ScoreStage


class PyramidDropConfig(CutConfig):
    """Where patches leave and whose attention is read; `keep` is a share of the tokens that each cut finds."""

    after: Cuts = ("22%", "47%", "72%")
    keep: Keep = 0.5
    rows: RowsOrAuto = "auto"


class PyramidDrop(ScoreStage[PyramidDropConfig]):
    """Keeps the patches to which the layer after the cut would pay the most attention."""

    Config = PyramidDropConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse rows that the decoder does not process together with the image."""
        require_rows(self.config.rows, info)

    def caveats(self, info: BackboneInfo) -> str:
        """Which rows are read on this backbone."""
        return rows_caveat(self.config.rows, info.decoder.causal)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The resolved rows at the layer after every cut."""
        rows = resolve_rows(self.config.rows, info.decoder.causal)
        return tuple(Probe(layer + 1, rows, ahead=True) for layer in self.cuts(info.decoder.depth))

    def score(self, ctx: SelectContext) -> Tensor:
        """Attention that the next layer would pay; before layer 0, which the paper does not try, that of layer 0."""
        return ctx.attention_ahead(resolve_rows(self.config.rows, ctx.causal)).mean((1, 2))
