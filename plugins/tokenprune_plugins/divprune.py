"""DivPrune (arXiv 2503.02175): keep the patches whose embeddings are most diverse.

The distance of two patches is 1 minus the cosine similarity of their projected embeddings. The first choice is the
patch whose nearest neighbour is farthest away. Each further choice is the patch whose distance to the nearest chosen
patch is largest. Text and attention are not used. The order of choice is the score, so a larger `keep` contains every
smaller one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, Plan, SelectContext
from tokenprune_plugins.shared.bases import ScoreStage
from tokenprune_plugins.shared.similarity import pairwise_cosine, similarity_flops


class DivPruneConfig(CutConfig):
    """Where DivPrune cuts; the released code keeps one tenth before layer 0."""

    keep: Keep = 0.1


class DivPrune(ScoreStage[DivPruneConfig]):
    """Keeps patches whose smallest pairwise distance is large, chosen greedily, one step for each kept token."""

    Config = DivPruneConfig

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of all pairs."""
        return sum(similarity_flops(cut.found, info.decoder.hidden) for cut in self.own_cuts(plan))

    def score(self, ctx: SelectContext) -> Tensor:
        """Diversity of the projected embeddings; after a layer, which the paper does not try, of the hidden states."""
        return farthest_first(ctx.patches, ctx.plan.cut_after[ctx.layer].keep)


def farthest_first(embeddings: Tensor, count: int, member: Tensor | None = None) -> Tensor:
    """Scores `[B, P]` by farthest-first traversal, highest for the first of `count` choices.

    Of equally far patches the one of lower index is chosen. Patches that are not chosen score below the chosen ones, by
    their distance to the nearest chosen patch.

    Args:
        embeddings: Embeddings of the patches `[B, P, D]`.
        count: Number of patches to choose.
        member: Boolean `[B, P]`, at least `count` true in each batch row: the patches that are compared and chosen; the
            others score lowest. All where left out.
    """
    distance = 1 - pairwise_cosine(embeddings)
    # Two mutual nearest neighbours tie for the first choice; symmetric distances keep rounding from deciding it.
    distance = torch.minimum(distance, distance.mT)
    outside = torch.zeros_like(distance[:, 0], dtype=torch.bool) if member is None else ~member
    own = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    neighbour = distance.masked_fill(own | outside[:, None], torch.inf).amin(-1)
    best = neighbour.masked_fill(outside, -torch.inf).argmax(-1, keepdim=True)
    nearest = torch.full_like(neighbour, torch.inf).masked_fill(outside, -torch.inf)
    score = torch.zeros_like(nearest)
    for place in range(count):
        score = score.scatter(1, best, float(3 + count - place))
        row = distance.gather(1, best[..., None].expand(-1, -1, distance.shape[-1]))[:, 0]
        nearest = torch.minimum(nearest, row).scatter(1, best, -torch.inf)
        best = nearest.argmax(-1, keepdim=True)
    return torch.where(score > 0, score, nearest.clamp(0, 2).masked_fill(outside, -1.0))
