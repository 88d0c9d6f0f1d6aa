"""SpecPrune's dynamic stage (arXiv 2509.05614, section on dynamic pruning): fewer patches the deeper the layer.

At each update layer a patch gets a weight by its rank in the attention of the chosen rows, times the layer's confidence
(high where attention is focused). The score of a patch is a moving average of these over the update layers so far. Cuts
between the update layers drop the patches with the lowest scores.
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
from tokenprune_plugins.shared.bases import last_drop
from tokenprune_plugins.shared.ranks import rank_in_views, rank_within
from tokenprune_plugins.specprune import signals


class DynamicConfig(CutConfig):
    """Where scores are updated, how, and where patches leave."""

    after: Cuts = ("31%", "47%", "62%", "78%")
    keep: Keep = 0.9
    updates: Layers = Field(
        default=("28%", "44%", "59%", "75%"), min_length=1, description="Layers after which scores are updated."
    )
    rows: Literal["instruction", "text", "action", "last"] = Field(
        default="instruction", description="Query rows whose attention ranks patches."
    )
    decay: float = Field(
        default=0.1,
        gt=0,
        description="Steepness of the weight over ranks: 0.1 distinguishes hundreds of ranks, 1 little more than ten.",
    )
    beta: float = Field(default=0.2, gt=0, le=1, description="Share of the newest layer in the moving average.")
    per_view: int = Field(default=0, ge=0, description="Number of best patches of each view that are always kept.")
    as_released: bool = Field(
        default=False,
        description="For comparison with the released code: weights in float32, cuts allowed before the first update "
        "(the lowest ids stay), and no further updates in a query after a cut that drops nothing.",
    )


class Dynamic(Stage[DynamicConfig]):
    """Drops patches at deeper layers by their ranks in the attention of earlier layers."""

    Config = DynamicConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the layers in this decoder.

        Raises:
            ValueError: If a cut comes before the first update without `as_released`, or if the decoder has no such
                rows.
        """
        require_rows(self.config.rows, info)
        self._depth = info.decoder.depth
        self._updates = layer_indices(self.config.updates, self._depth, "updates")
        self._cuts = self.cuts(self._depth)
        first = min(self._cuts)
        if first < self._updates[0] and not self.config.as_released:
            raise ValueError(
                f"the cut after layer {first} comes before the first update after layer {self._updates[0]}, so "
                "tokens would have no score yet; move the cut (`after`) or the update (`updates`)"
            )

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and the update layers."""
        return super().requirements(info).also_called_after(self._updates)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The rows at each update layer that a later cut of this mode uses."""
        last = last_drop(self, self._depth, mode)
        return tuple(Probe(layer, self.config.rows) for layer in self._updates if layer <= last)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Update the scores, or propose them, or both."""
        if ctx.layer > last_drop(self, self._depth, ctx.mode) or (self.config.as_released and self._stopped(ctx)):
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
        """Weight of each patch's rank at this layer, times the layer's confidence `[B, P]`."""
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
