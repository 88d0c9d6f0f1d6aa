"""A control that keeps an evenly spread grid of each view's patches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import SelectContext, TokenLayout
from tokenprune_plugins.shared.bases import HalfConfig, Scored
from tokenprune_plugins.shared.grid import grid_scores


class UniformGrid(Scored[HalfConfig]):
    """Keeps patches spread evenly over each view, equally many of every view.

    Patches are ranked by an ordered-dither pattern, so each larger keep contains every smaller one.
    """

    Config = HalfConfig

    def __init__(self, config: HalfConfig) -> None:
        """Tables are made at the first query of each layout."""
        super().__init__(config)
        self._tables: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def score(self, ctx: SelectContext) -> Tensor:
        """The place of each patch in its view's pattern."""
        key = (ctx.layout, ctx.prunable.device)
        if key not in self._tables:
            self._tables[key] = grid_scores(ctx.layout).to(ctx.prunable.device)
        return self._tables[key][ctx.prunable]
