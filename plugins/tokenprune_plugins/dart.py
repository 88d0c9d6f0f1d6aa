"""DART (arXiv 2502.11494): keep a few pivots and the patches least similar to them, to avoid duplicates.

After one early layer the `pivot_patches` patches and the `pivot_text` text tokens with the largest keys (L1 norm over
all heads) become pivots. The pivots take equal shares of the budget in turn: each takes the remaining patches with the
lowest cosine similarity to it, compared after the decoder's final norm. Text pivots stay in the sequence, because only
patches are pruned. No attention is computed. The released code takes its pivots in the order of a Python set; here
patches come before text, and larger keys before smaller ones.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Cuts, Keep, LayerContext, Plan, Proposal, Stage, hookimpl, rows_at
from tokenprune_plugins.shared.similarity import similarity_flops, unit_vectors


class DARTConfig(CutConfig):
    """Where DART cuts, and how many pivots it uses."""

    after: Cuts = (1,)
    keep: Keep = 0.25
    pivot_patches: int = Field(default=4, ge=1, description="Number of patches that are pivots.")
    pivot_text: int = Field(
        default=4, ge=0, description="Number of text tokens that are pivots; all of them where the text is shorter."
    )


class DART(Stage[DARTConfig]):
    """Keeps the pivots and the patches least similar to them."""

    Config = DARTConfig

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of patches and pivots."""
        text = min(self.config.pivot_text, len(plan.layout.span("text")))
        return sum(
            similarity_flops(cut.found, info.decoder.hidden, min(self.config.pivot_patches, cut.keep) + text)
            for cut in self.own_cuts(plan)
        )

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Score patches by the order in which pivots take them."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        norm = ctx.k.to(torch.promote_types(ctx.k.dtype, torch.float32)).abs().sum((1, 3))
        patches, text = ctx.tokens.to_current(ctx.prunable), ctx.tokens.to_current(ctx.row_ids("text"))
        pivots = largest(norm.gather(1, patches), min(self.config.pivot_patches, keep))
        text_pivots = largest(norm.gather(1, text), min(self.config.pivot_text, text.shape[1]))
        # Only the rows that are compared are normed; the other text rows are not needed.
        normed = ctx.decoder.norm(rows_at(ctx.hidden, patches))
        normed_text = ctx.decoder.norm(rows_at(ctx.hidden, text.gather(1, text_pivots)))
        return Proposal(score=pivot_scores(normed, pivots, normed_text, keep))


def largest(values: Tensor, count: int) -> Tensor:
    """Indices `[B, count]` of the largest of `[B, n]`, in descending order; of equal values the lower index first."""
    return values.argsort(dim=1, descending=True, stable=True)[:, :count]


def pivot_scores(patches: Tensor, pivots: Tensor, text_pivots: Tensor, keep: int) -> Tensor:
    """Scores `[B, P]`, highest for the pivots, then in the order in which pivots take patches.

    Args:
        patches: Features of the patches `[B, P, D]`.
        pivots: Indices of the patches that are pivots `[B, V]`, `1 <= V <= keep`.
        text_pivots: Features of the text tokens that are pivots `[B, T, D]`.
        keep: Number of patches to keep, including pivots; the remainder of the division goes to the first pivots.
    """
    directions = unit_vectors(patches)
    all_pivots = torch.cat([rows_at(directions, pivots), unit_vectors(text_pivots)], dim=1)
    similarity = all_pivots @ directions.mT
    # Patches that no pivot takes come last, the least similar first.
    score = -similarity.amax(1)
    n_pivots, taken = all_pivots.shape[1], pivots.shape[1]
    score = score.scatter(1, pivots, 2.0 + keep)
    free = torch.ones_like(score, dtype=torch.bool).scatter(1, pivots, False)
    share, extra = divmod(keep - taken, n_pivots)
    for number in range(n_pivots):
        takes = share + (number < extra)
        order = similarity[:, number].masked_fill(~free, torch.inf).argsort(dim=1, stable=True)[:, :takes]
        score = score.scatter(1, order, 2.0 + keep - number - 1)
        free = free.scatter(1, order, False)
    return score
