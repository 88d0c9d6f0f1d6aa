"""EfficientVLA's token half (arXiv 2506.10100): key patches, then relevant ones, then ones unlike the key patches.

Relevance is what the text attends to after one layer, mean over heads. The most relevant `key` patches are kept in any
case; of the rest of the budget a share `alpha` goes to the next relevant ones, and what is left to the patches whose
largest cosine with a key patch is smallest. The authors have released no code, and where they cut, `alpha`, and which
features they compare could not be read at first hand: `after`, `alpha` and the hidden states taken here are ours.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Plan,
    Probe,
    Proposal,
    Stage,
    TokenLayout,
    hookimpl,
    rows_at,
)
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.shared.similarity import likeness_flops, unit


class EfficientVLATokensConfig(CutConfig):
    """Where patches leave, and how the budget is divided."""

    after: Cuts = ("6%",)
    keep: Keep = 0.25
    key: int = Field(default=8, ge=1, description="Patches kept for their relevance in any case; 4 to 8 in the paper.")
    alpha: float = Field(default=0.5, ge=0, le=1, description="Share of the rest that is chosen by relevance.")


class EfficientVLATokens(Stage[EfficientVLATokensConfig]):
    """Keeps what the text attends to, and some of what looks different from it."""

    Config = EfficientVLATokensConfig

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows, at every layer a cut follows."""
        return tuple(Probe(layer, "text") for layer in self.requirements(info).layers)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines with the key patches."""
        return sum(
            likeness_flops(cut.found, info.decoder.hidden, min(self.config.key, cut.keep))
            for cut in self.own_cuts(plan)
        )

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Tiers: key and relevant patches by relevance, the others by how unlike the key patches they are."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        key = min(self.config.key, keep)
        relevance = ctx.attention_rows("text").mean(1).sum(1)
        return Proposal(score=tiers(relevance, ctx.patches, key, round(self.config.alpha * (keep - key))))


def tiers(relevance: Tensor, features: Tensor, key: int, relevant: int) -> Tensor:
    """Scores `[B, P]`: above 2 the best `key + relevant` by relevance `[B, P]`, below by unlikeness to the key patches.

    Args:
        relevance: Of equals the lower index counts as more relevant.
        features: What is compared `[B, P, D]`.
        key: Patches that the others are compared with.
        relevant: Patches after them that relevance chooses.
    """
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    place = rank_within(relevance)
    directions = unit(features)
    likeness = (directions @ rows_at(directions, order[:, :key]).mT).amax(-1)
    first = 3 - place.to(likeness.dtype) / place.shape[1]
    return torch.where(place < key + relevant, first, 1 - likeness)
