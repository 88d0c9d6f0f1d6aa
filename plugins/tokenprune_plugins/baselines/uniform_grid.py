"""A baseline that keeps an evenly spread grid of each view's patches."""

from __future__ import annotations

from torch import Tensor

from tokenprune import SelectContext
from tokenprune_plugins.shared.bases import HalfConfig, ScoreStage
from tokenprune_plugins.shared.grid import grid_scores
from tokenprune_plugins.shared.layout_table import LayoutTable


class UniformGrid(ScoreStage[HalfConfig]):
    """Keeps patches spread evenly over each view, the same number of every view.

    Patches are ranked by an ordered-dithering pattern, so each larger `keep` contains every smaller one.
    """

    Config = HalfConfig

    def __init__(self, config: HalfConfig) -> None:
        super().__init__(config)
        self._scores = LayoutTable(grid_scores)

    def score(self, ctx: SelectContext) -> Tensor:
        """Score of each patch in the pattern of its view."""
        return self._scores.of(ctx)[ctx.prunable]
