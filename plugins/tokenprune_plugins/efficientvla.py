"""EfficientVLA's token pruning (arXiv 2506.10100): keep key patches, other relevant patches, and diverse patches.

The relevance of a patch is the attention it gets from the text at the layer before the cut: mean over heads, sum over
text tokens. The `key` most relevant patches are always kept. Of the remaining budget a share `alpha` goes to the next
most relevant patches, and the rest to the patches whose largest cosine similarity to a key patch is smallest. The
authors have released no code, and their cut, their `alpha` and the features they compare could not be read at first
hand: `after`, `alpha` and the comparison of hidden states are our choices.
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
from tokenprune_plugins.shared.similarity import similarity_flops, unit_vectors


class EfficientVLATokensConfig(CutConfig):
    """Where patches leave, and how the budget is divided."""

    after: Cuts = ("6%",)
    keep: Keep = 0.25
    key: int = Field(
        default=8, ge=1, description="Key patches: the most relevant ones, always kept; 4 to 8 in the paper."
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the remaining budget that goes to relevance; the rest: diversity.",
    )


class EfficientVLATokens(Stage[EfficientVLATokensConfig]):
    """Keeps the patches that the text attends to most, and patches least similar to them."""

    Config = EfficientVLATokensConfig

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows at every layer that a cut follows."""
        return tuple(Probe(layer, "text") for layer in self.requirements(info).layers)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities to the key patches."""
        return sum(
            similarity_flops(cut.found, info.decoder.hidden, min(self.config.key, cut.keep))
            for cut in self.own_cuts(plan)
        )

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Score key and relevant patches by relevance, and below them the others by diversity."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        key = min(self.config.key, keep)
        relevance = ctx.attention_rows("text").mean(1).sum(1)
        return Proposal(score=tiered_scores(relevance, ctx.patches, key, round(self.config.alpha * (keep - key))))


def tiered_scores(relevance: Tensor, features: Tensor, key: int, relevant: int) -> Tensor:
    """Scores `[B, P]`: the `key + relevant` most relevant patches score above 2, the others 1 minus their similarity.

    Args:
        relevance: Relevance `[B, P]`; of equal patches the lower index ranks first.
        features: Features that are compared `[B, P, D]`.
        key: Number of key patches, to which the others are compared.
        relevant: Number of patches after them that relevance chooses.
    """
    order = relevance.argsort(dim=-1, descending=True, stable=True)
    rank = rank_within(relevance)
    directions = unit_vectors(features)
    similarity = (directions @ rows_at(directions, order[:, :key]).mT).amax(-1)
    by_relevance = 3 - rank.to(similarity.dtype) / rank.shape[1]
    return torch.where(rank < key + relevant, by_relevance, 1 - similarity)
