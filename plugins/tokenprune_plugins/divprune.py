"""DivPrune (arXiv 2503.02175): keep the patches whose embeddings lie farthest from each other, whatever they show.

The distance of two patches is 1 minus the cosine of their projected embeddings. The first to be kept is the one whose
nearest neighbour is farthest; then, again and again, the one farthest from all that are kept already. Neither text nor
attention is looked at. The order of choosing is the score, so a larger keep contains every smaller one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, Plan, SelectContext
from tokenprune_plugins.shared.bases import Scored
from tokenprune_plugins.shared.similarity import likeness, likeness_flops


class DivPruneConfig(CutConfig):
    """Where DivPrune cuts; the released code keeps a tenth before layer 0."""

    keep: Keep = 0.1


class DivPrune(Scored[DivPruneConfig]):
    """Keeps a set whose smallest distance is large, found greedily; as many steps as tokens are kept."""

    Config = DivPruneConfig

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of all pairs."""
        return sum(likeness_flops(cut.found, info.decoder.hidden) for cut in self.own_cuts(plan))

    def score(self, ctx: SelectContext) -> Tensor:
        """Diversity of the projected patches; after a layer of their hidden states, which the paper does not try."""
        return farthest_first(ctx.patches, ctx.plan.cut_after[ctx.layer].keep)


def farthest_first(embeddings: Tensor, count: int, member: Tensor | None = None) -> Tensor:
    """Scores `[B, P]` of embeddings `[B, P, D]`, highest for the first of `count` choices.

    Of equals the lower index is chosen. What is not chosen scores below, by its distance from what is.

    Args:
        embeddings: What is compared.
        count: Choices to make.
        member: Boolean `[B, P]`: only these are compared and chosen, at least `count` in each row; the others score
            lowest. All where left out.
    """
    distance = 1 - likeness(embeddings)
    # Two patches nearest to each other tie for the first choice, and rounding must not decide it.
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
