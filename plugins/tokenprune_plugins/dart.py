"""DART (arXiv 2502.11494): keep a few pivots and the patches least like them, so that no two kept ones are alike.

After one early layer the `pivot_patches` patches and `pivot_text` text tokens whose keys are longest (L1 norm, all
heads) become pivots. One pivot after the other takes its equal share of the budget: the remaining patches with the
lowest cosine to it, compared after the decoder's last norm. Text pivots themselves are kept as all text is. No
attention is computed. The released code goes through its pivots in the order of a Python set; here patches come before
text, longer keys before shorter ones.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Cuts, Keep, LayerContext, Plan, Proposal, Stage, hookimpl, rows_at
from tokenprune_plugins.shared.similarity import likeness_flops, unit


class DARTConfig(CutConfig):
    """Where DART cuts, and how many pivots it takes."""

    after: Cuts = (1,)
    keep: Keep = 0.25
    pivot_patches: int = Field(default=4, ge=1, description="Patches that are pivots.")
    pivot_text: int = Field(default=4, ge=0, description="Text tokens that are pivots; as many as there are at most.")


class DART(Stage[DARTConfig]):
    """Keeps patches that resemble the pivots least."""

    Config = DARTConfig

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of patches and pivots."""
        text = min(self.config.pivot_text, len(plan.layout.span("text")))
        return sum(
            likeness_flops(cut.found, info.decoder.hidden, min(self.config.pivot_patches, cut.keep) + text)
            for cut in self.own_cuts(plan)
        )

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """The order in which pivots take patches."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        length = ctx.k.to(torch.promote_types(ctx.k.dtype, torch.float32)).abs().sum((1, 3))
        patches, text = ctx.tokens.to_current(ctx.prunable), ctx.tokens.to_current(ctx.row_ids("text"))
        first = longest(length.gather(1, patches), min(self.config.pivot_patches, keep))
        others = longest(length.gather(1, text), min(self.config.pivot_text, text.shape[1]))
        # Norms of rows alone are wanted: all text and all patches would be the whole sequence.
        normed = ctx.decoder.norm(rows_at(ctx.hidden, patches))
        words = ctx.decoder.norm(rows_at(ctx.hidden, text.gather(1, others)))
        return Proposal(score=least_alike(normed, first, words, keep))


def longest(length: Tensor, count: int) -> Tensor:
    """Indices `[B, count]` of the largest of `[B, n]`, the largest first, of equals the lower index."""
    return length.argsort(dim=1, descending=True, stable=True)[:, :count]


def least_alike(patches: Tensor, pivots: Tensor, words: Tensor, keep: int) -> Tensor:
    """Scores `[B, P]`, highest for the pivots, then in the order in which they take patches.

    Args:
        patches: What is compared `[B, P, D]`.
        pivots: Indices of the patches that are pivots `[B, V]`, `1 <= V <= keep`.
        words: Text tokens that are pivots `[B, T, D]`.
        keep: Patches to keep, pivots among them; what does not divide goes to the first pivots.
    """
    directions = unit(patches)
    looking = torch.cat([rows_at(directions, pivots), unit(words)], dim=1)
    likeness = looking @ directions.mT
    # What nobody takes comes last, the least alike first.
    score = -likeness.amax(1)
    n_pivots, taken = looking.shape[1], pivots.shape[1]
    score = score.scatter(1, pivots, 2.0 + keep)
    free = torch.ones_like(score, dtype=torch.bool).scatter(1, pivots, False)
    share, extra = divmod(keep - taken, n_pivots)
    for number in range(n_pivots):
        takes = share + (number < extra)
        order = likeness[:, number].masked_fill(~free, torch.inf).argsort(dim=1, stable=True)[:, :takes]
        score = score.scatter(1, order, 2.0 + keep - number - 1)
        free = free.scatter(1, order, False)
    return score
