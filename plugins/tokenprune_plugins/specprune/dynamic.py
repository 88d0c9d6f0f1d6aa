"""SpecPrune's dynamic stage (arXiv 2509.05614, section on dynamic pruning): fewer patches the deeper the layer.

At its update layers each patch gets the weight of its rank in the attention of the chosen rows, times the layer's
confidence (high where attention is focused), averaged over the layers passed so far. Cuts between them drop the worst.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Layers,
    Probe,
    Proposal,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
    layer_indices,
    require_rows,
)
from tokenprune_plugins.shared.ranks import rank_in_views, rank_within
from tokenprune_plugins.specprune import signals


class DynamicConfig(CutConfig):
    """Where scores are taken and where patches leave."""

    after: Cuts = ("31%", "47%", "62%", "78%")
    keep: Keep = 0.9
    updates: Layers = Field(
        default=("28%", "44%", "59%", "75%"), min_length=1, description="Layers after which scores are updated."
    )
    rows: Literal["instruction", "text", "action", "last"] = Field(
        default="instruction", description="Queries whose attention ranks patches."
    )
    decay: float = Field(
        default=0.1,
        gt=0,
        description="Steepness of the weight over ranks. 0.1 tells hundreds of ranks apart, 1 little more than ten.",
    )
    beta: float = Field(default=0.2, gt=0, le=1, description="Share of the newest layer in the moving average.")
    per_view: int = Field(default=0, ge=0, description="Patches of each view that are kept in any case, the best ones.")
    as_released: bool = Field(
        default=False,
        description="Weights in float32, cuts before the first update (the lowest ids stay), and no more updates in a "
        "query once a cut drops nothing; for comparison with the released code.",
    )


class Dynamic(Stage[DynamicConfig]):
    """Drops patches at deeper layers by their rank in earlier layers' attention."""

    Config = DynamicConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find the layers in this decoder.

        Raises:
            ValueError: If a cut comes before the first update and nothing says that it may, or if the decoder has no
                such rows.
        """
        require_rows(self.config.rows, info)
        self._depth = info.decoder.depth
        self._updates = layer_indices(self.config.updates, self._depth, "updates")
        self._cuts = self.cuts(self._depth)
        first = min(self._cuts)
        if first < self._updates[0] and not self.config.as_released:
            raise ValueError(
                f"the cut after layer {first} comes before the first update after layer {self._updates[0]}, so "
                "nothing would say which tokens to keep; move one of them"
            )

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and the layers at which scores are updated."""
        return super().requirements(info).also_called_after(self._updates)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The rows, at each update that a later cut of this mode uses."""
        return tuple(Probe(layer, self.config.rows) for layer in self._updates if layer <= self._last(mode))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Update the scores, or propose them, or both."""
        if ctx.layer > self._last(ctx.mode) or (self.config.as_released and self._stopped(ctx)):
            return None
        score = torch.zeros_like(ctx.prunable, dtype=torch.float64)
        if ctx.layer > self._updates[0]:
            score = ctx.recall("score")[0]
        if ctx.layer in self._updates:
            score = signals.moving_average(score, self._evidence(ctx), self.config.beta)
            ctx.remember("score", score)
        if ctx.layer not in self._cuts:
            return None
        return Proposal(score=score, protect=self._best_of_views(ctx, score))

    def _evidence(self, ctx: LayerContext) -> Tensor:
        attention = ctx.attention_rows(self.config.rows)
        ranks = rank_within(attention.mean((1, 2)))
        dtype = torch.float32 if self.config.as_released else torch.float64
        weights = signals.rank_weights(ranks.shape[1], self.config.decay, dtype, ranks.device)
        confidence = ctx.once(f"confidence.{ctx.layer}", lambda: signals.entropy_confidence(attention))
        return weights.double()[ranks] * confidence[:, None]

    def _stopped(self, ctx: LayerContext) -> bool:
        """Whether an earlier cut of this query dropped nothing."""
        passed = (cut for cut in ctx.plan.cuts if cut.after in self._cuts and cut.after < ctx.layer)
        return any(cut.keep == cut.found for cut in passed)

    def _best_of_views(self, ctx: LayerContext, score: Tensor) -> Tensor | None:
        if not self.config.per_view:
            return None
        return rank_in_views(ctx, score) < self.config.per_view

    def _last(self, mode: str) -> int:
        """The last cut that drops anything in this mode; work after it would be for nothing."""
        return max(self.drops(self._depth, mode), default=-2)
