"""Token merging (ToMe, arXiv 2210.09461): merge the most similar pairs of tokens by bipartite matching.

Tokens are assigned alternately to sets A and B. Each token of A is matched with its most similar token of B; the most
similar pairs merge into their token of B, as a mean weighted by the number of patches that each token stands for. So at
most half of the tokens leave at one cut. The similarity is the cosine of keys, mean over heads; before layer 0, where
there are no keys, of embeddings. The paper's proportional attention, which counts a merged token once for each of its
patches, is left out, because the fused attention kernel does not support it. A merged token has the position of its
token of B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Plan,
    Proposal,
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    hookimpl,
    rows_at,
)
from tokenprune_plugins.shared.merging import merge_weights
from tokenprune_plugins.shared.similarity import pairwise_cosine, similarity_flops


class ToMeConfig(CutConfig):
    """Where pairs merge; a cut keeps at least half of the tokens that it finds."""

    after: Cuts = ("embedding", "6%")
    keep: Keep = 0.5


class ToMe(Stage[ToMeConfig]):
    """Merges the most similar pairs of tokens."""

    Config = ToMeConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and a call before layer 0 to set every token's size to 1; tokens that leave are merged."""
        return replace(super().requirements(info).also_called_after([-1]), removal=Removal.MERGE)

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the cuts in this decoder.

        Raises:
            ValueError: If a cut keeps less than half.
        """
        self._cuts = self.cuts(info.decoder.depth)
        modes = next(iter(self.config.modes().values()), {""})
        amounts = {self.config.budget(mode, entry).amount for mode in modes for entry in range(len(self.config.after))}
        small = [amount for amount in amounts if isinstance(amount, float) and amount < 0.5]
        if small:
            raise ValueError(f"keep: {min(small)}: at most half can merge at one cut; use several cuts")

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of all pairs of embeddings, or of keys."""
        shape = info.decoder
        return sum(
            similarity_flops(cut.found, shape.hidden if cut.after < 0 else shape.head_dim)
            for cut in self.own_cuts(plan)
        )

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Set every token's size to 1, and merge by embeddings if there is a cut before layer 0."""
        ctx.scratch["size"] = torch.ones_like(ctx.prunable, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        return self._propose(ctx, ctx.patches) if ctx.layer in self._cuts else None

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Merge by keys, mean over heads."""
        return self._propose(ctx, rows_at(ctx.k.mean(1), ctx.tokens.to_current(ctx.prunable)))

    def _propose(self, ctx: SelectContext, metric: Tensor) -> Proposal:
        places = ctx.places
        size = ctx.scratch["size"].gather(1, places)
        best, partner = bipartite_matching(metric)
        second = torch.arange(metric.shape[1], device=metric.device) % 2 == 1

        def merge(chosen: Tensor) -> Tensor:
            own = torch.arange(metric.shape[1], device=metric.device).expand_as(partner)
            kept = torch.zeros_like(second.expand_as(partner)).scatter(1, chosen, True)
            destination = torch.where(kept, own, partner)
            total = torch.zeros_like(size).scatter_add(1, destination, size)
            ctx.scratch["size"] = ctx.scratch["size"].scatter(1, places, total)
            return merge_weights(destination, size, chosen)

        return Proposal(score=-best, protect=second.expand_as(partner), merge=merge)


def bipartite_matching(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity `[B, P]` of each token of A to its partner, the most similar token of B, and the partners `[B, P]`.

    Tokens of B, and all tokens where B is empty, are their own partner with a similarity of -2.

    Args:
        metric: Features to compare `[B, P, D]`; even indices are set A, odd ones set B.
    """
    n = metric.shape[1]
    own = torch.arange(n, device=metric.device)
    second = own % 2 == 1
    similarity = pairwise_cosine(metric).masked_fill(~second, -torch.inf)
    best, partner = similarity.max(2)
    alone = second | torch.isinf(best)
    return best.masked_fill(alone, -2.0), torch.where(alone, own, partner)
