"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): keep patches with outlying attention, merge all others into them.

In each view a patch is an outlier if its attention from the vision tower's class token exceeds Q3 + 1.5 (Q3 - Q1);
Q1 and Q3 are the quartiles of the view's attention. So the number of outliers is known only during the query; `bucket`
rounds it up. As in the released code, heads are not split: the attention is one softmax over products of the full
width. PruMerge+ (`spread: true`) adds an even sample: with `step` = int(patches / outliers), every int(step / 3)-th
patch in raster order starting at int(step / 6), or every patch where step < 3. The released code leaves out the last
patch, and fails where step < 3.

Each kept patch also receives the 32 other patches of its view, kept or not, whose keys are most similar to its own,
each weighted by its attention. The weights are not normalised, so they sum to more than 1. One further token holds the
sum of all patches that leave the view, weighted by attention too. The released code appends this token; here it takes
the place of the best patch that would leave. Where other stages or a fixed `keep` choose more or fewer patches, it is
the lowest-ranked kept patch of the view. A view that loses no patch is not changed. A view without outliers keeps all
its patches; there the released code keeps only the further token or, for PruMerge+, divides by zero.

The released code reads the block after the one whose output is the feature; here it is the block of the feature itself,
because later blocks do not run. Tokens merge behind the projector. Where no tower has a class token, the attention that
a patch gets from all tokens, mean over heads, is used instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from tokenprune import UNION, BackboneInfo, CutConfig, Keep, Plan, Proposal, Removal, SelectContext, StageNeeds
from tokenprune_plugins.shared.bases import AnyLayerStage
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.shared.similarity import pairwise_cosine, similarity_flops
from tokenprune_plugins.shared.tower_attention import AttentionOrAuto, attention_caveat, attention_kind


class PruMergeConfig(CutConfig):
    """Which patches stay, and how many are merged into each."""

    keep: Keep = UNION
    spread: bool = Field(default=False, description="PruMerge+: also keep an even sample of each view.")
    neighbours: int = Field(default=32, ge=0, description="Number of patches that are merged into each kept one.")
    attention: AttentionOrAuto = "auto"


class PruMerge(AnyLayerStage[PruMergeConfig]):
    """Keeps the patches whose attention is an outlier in their view, and merges the others into them."""

    Config = PruMergeConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve which attention is read on this backbone."""
        self._kind = attention_kind(self.config.attention, info, "cls_whole")

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, the attention and the full-width keys of the vision tower; tokens that leave are merged."""
        return replace(super().requirements(info), encoder_attention=(self._kind, "keys_whole"), removal=Removal.MERGE)

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention is read on this backbone."""
        heads = "heads not split" if self._kind == "cls_whole" else "mean over heads"
        return f"{attention_caveat(self.config.attention, info, 'cls_whole')}; {heads}"

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of all pairs of keys, at cuts where any token leaves."""
        cuts = [cut for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return sum(similarity_flops(cut.found, info.encoder_attention["keys_whole"].width) for cut in cuts)

    def propose(self, ctx: SelectContext) -> Proposal:
        """Protect the outliers, or with `spread` the even sample too, and merge the others into what stays."""
        attention, keys = ctx.encoder_attention(self._kind), ctx.encoder_attention("keys_whole")
        view = ctx.views_of
        wanted = kept_patches(attention, view, len(ctx.layout.views), self.config.spread)
        score, protect = scores_and_protected(attention, view, wanted)

        def merge(chosen: Tensor) -> Tensor:
            return neighbour_weights(attention, pairwise_cosine(keys), view, score, chosen, self.config.neighbours)

        return Proposal(score=score, protect=protect, merge=merge)


def kept_patches(attention: Tensor, view: Tensor, views: int, spread: bool) -> Tensor:
    """Outliers of each view, boolean `[B, P]`; all patches of a view without outliers.

    Args:
        attention: Attention that each patch gets `[B, P]`.
        view: Number of each patch's view `[B, P]`.
        views: Number of views.
        spread: Whether to add an even sample of each view.
    """
    member = view[:, None] == torch.arange(views, device=view.device)[:, None]
    inside = attention[:, None].masked_fill(~member, torch.nan)
    low, high = (torch.nanquantile(inside, share, dim=2, keepdim=True) for share in (0.25, 0.75))
    outlier = inside > high + 1.5 * (high - low)
    found, size = outlier.sum(2, keepdim=True), member.sum(2, keepdim=True)
    stays = outlier | (found == 0)
    if spread:
        step = size // found.clamp(min=1)
        place, first = member.cumsum(2) - 1, step // 6
        stays = stays | (place >= first) & ((place - first) % (step // 3).clamp(min=1) == 0)
    return (stays & member).any(1)


def scores_and_protected(attention: Tensor, view: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Scores without ties `[B, P]`, wanted patches highest, and which patches are protected `[B, P]`.

    Protected are the wanted patches and the best other patch of each view, which becomes the sum of those that leave.
    """
    n = attention.shape[1]
    score = (n * wanted.long() + n - rank_within(attention)).to(torch.float32)
    beside = (view[:, :, None] == view[:, None]) & ~wanted[:, None]
    best = score[:, None].masked_fill(~beside, 0).amax(2)
    return score, wanted | (score == best)


def neighbour_weights(
    attention: Tensor, similarity: Tensor, view: Tensor, score: Tensor, chosen: Tensor, neighbours: int
) -> Tensor:
    """Weights `[B, K, P]` of all patches in each kept token.

    Args:
        attention: Attention that each patch gets `[B, P]`.
        similarity: Cosine similarity of every pair of patches `[B, P, P]`; of equal ones the lower index is nearer.
        view: Number of each patch's view `[B, P]`.
        score: Scores without ties, by which patches were kept `[B, P]`.
        chosen: Kept patches `[B, K]`.
        neighbours: Number of patches merged into each kept one.
    """
    n = attention.shape[1]
    own = one_hot(chosen, n).bool()
    kept = own.any(1, keepdim=True)
    beside = view.gather(1, chosen)[:, :, None] == view[:, None]
    rest = beside & ~kept
    lost = rest.any(2, keepdim=True)
    least = score[:, None].masked_fill(~(beside & kept), torch.inf).amin(2, keepdim=True)
    last = lost & (score.gather(1, chosen)[:, :, None] == least)

    others = beside & ~own
    near = similarity.gather(1, chosen[..., None].expand(-1, -1, n)).masked_fill(~others, -torch.inf)
    nearest = near.argsort(dim=2, descending=True, stable=True)[:, :, :neighbours]
    close = torch.zeros_like(others).scatter(2, nearest, True) & others & lost
    weight = attention[:, None]
    return torch.where(last, weight * (rest | own), own + weight * close)
