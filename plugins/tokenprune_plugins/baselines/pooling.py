"""Average pooling, a baseline: every square of patches becomes its mean, independent of its content.

The mean of a square of `side * side` patches takes the place and position of the square's first patch. So `keep: 0.25`
fits squares of 2 x 2 exactly where the grid is divisible by 2. With a smaller `keep` the squares at the end of the
sequence are lost.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Keep,
    Proposal,
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
)
from tokenprune_plugins.shared.layout_table import LayoutTable
from tokenprune_plugins.shared.merging import merge_weights


class PoolConfig(CutConfig):
    """Size of the squares; `keep` should be 1 over the square's area."""

    keep: Keep = 0.25
    side: int = Field(default=2, ge=1, description="Patches along each side of a square.")


class Pool(Stage[PoolConfig]):
    """Averages squares of patches before layer 0."""

    Config = PoolConfig

    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config)
        self._destination = LayoutTable(partial(squares, side=config.side))

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cut before layer 0; tokens that leave are merged."""
        return replace(super().requirements(info), removal=Removal.MERGE)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Keep the first patch of each square, as the square's mean."""
        destination = self._destination.of(ctx).expand_as(ctx.prunable)
        own = torch.arange(ctx.prunable.shape[1], device=ctx.prunable.device)
        size = torch.ones_like(destination, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        score = (destination == own).float()
        return Proposal(score=score, merge=lambda chosen: merge_weights(destination, size, chosen))


def squares(layout: TokenLayout, side: int) -> Tensor:
    """Index `[P]`, among the prunable tokens, of the first patch of each token's square; its own without a grid."""
    place = {token: number for number, token in enumerate(layout.prunable)}
    first = dict(place)
    for segment in layout.views.values():
        for number, token in enumerate(segment.span):
            if segment.grid is not None and token in place:
                row, col = (at // side * side for at in divmod(number, segment.grid[1]))
                first[token] = place[segment.start + row * segment.grid[1] + col]
    return torch.tensor([first[token] for token in layout.prunable])  # cold: once per layout
