"""Average pooling, a control: each square of patches becomes its mean, whatever it shows.

A square of `side * side` patches is kept as its first patch, at that patch's position, so `keep: 0.25` is exactly
squares of two by two where the grid divides. With fewer tokens the squares at the end of the sequence are lost.
"""

from __future__ import annotations

from dataclasses import replace

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
from tokenprune_plugins.shared.merging import into


class PoolConfig(CutConfig):
    """Size of the squares; `keep` should be one over its area."""

    keep: Keep = 0.25
    side: int = Field(default=2, ge=1, description="Patches along each side of a square.")


class Pool(Stage[PoolConfig]):
    """Averages squares of patches before layer 0."""

    Config = PoolConfig

    def __init__(self, config: PoolConfig) -> None:
        """Tables are made at the first query of each layout."""
        super().__init__(config)
        self._tables: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """What leaves is averaged."""
        return replace(super().requirements(info), removal=Removal.MERGE)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Keep the first patch of each square, as the square's mean."""
        key = (ctx.layout, ctx.prunable.device)
        if key not in self._tables:
            self._tables[key] = squares(ctx.layout, self.config.side).to(ctx.prunable.device)
        destination = self._tables[key].expand_as(ctx.prunable)
        own = torch.arange(ctx.prunable.shape[1], device=ctx.prunable.device)
        size = torch.ones_like(destination, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        return Proposal(score=(destination == own).float(), merge=lambda chosen: into(destination, size, chosen))


def squares(layout: TokenLayout, side: int) -> Tensor:
    """For each prunable token `[P]` the place of its square's first patch; its own where a view has no grid."""
    place = {token: number for number, token in enumerate(layout.prunable)}
    first = dict(place)
    for segment in layout.views.values():
        for number, token in enumerate(segment.span):
            if segment.grid is not None and token in place:
                row, col = (at // side * side for at in divmod(number, segment.grid[1]))
                first[token] = place[segment.start + row * segment.grid[1] + col]
    return torch.tensor([first[token] for token in layout.prunable])  # cold: once per layout
