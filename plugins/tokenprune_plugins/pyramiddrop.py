"""PyramidDrop (arXiv 2410.17247): half of the patches leave at each of three depths.

Before layers 8, 16 and 24 of 32 the coming layer's own norm and projections say how much the last instruction token
would attend to each patch, mean over heads; 50, 25 and 12.5 % of all patches go on. The released code renumbers the
kept tokens (`positions: compact`), as the preset does. In a bidirectional decoder the last row is a stop token that
means nothing, so there the rows are the text's.
"""

from __future__ import annotations

from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Cuts, Keep, Probe, SelectContext, TokenLayout, require_rows
from tokenprune_plugins.shared.attention_rows import RowsOrAuto, rows_note, rows_read
from tokenprune_plugins.shared.bases import Scored


class PyramidDropConfig(CutConfig):
    """Where patches leave; `keep` is a share of what each cut finds."""

    after: Cuts = ("22%", "47%", "72%")
    keep: Keep = 0.5
    rows: RowsOrAuto = "auto"


class PyramidDrop(Scored[PyramidDropConfig]):
    """Keeps the patches that the layer after the cut would attend to most."""

    Config = PyramidDropConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse rows that the decoder does not have beside the image."""
        require_rows(self.config.rows, info)

    def caveats(self, info: BackboneInfo) -> str:
        """Which rows are read on this backbone."""
        return rows_note(self.config.rows, info.decoder.causal)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The rows, at the layer after every cut."""
        rows = rows_read(self.config.rows, info.decoder.causal)
        return tuple(Probe(layer + 1, rows, ahead=True) for layer in self.cuts(info.decoder.depth))

    def score(self, ctx: SelectContext) -> Tensor:
        """Attention that the next layer would pay; before layer 0, which the paper does not try, layer 0."""
        return ctx.attention_ahead(rows_read(self.config.rows, ctx.causal)).mean((1, 2))
