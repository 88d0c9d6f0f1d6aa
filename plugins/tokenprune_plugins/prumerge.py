"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): patches whose attention stands out, and all others merged into them.

In each view a patch stands out if the vision tower's class token gives it more than Q3 + 1.5 (Q3 - Q1), Q1 and Q3 being
the quartiles of what the view's patches get. So their number is known only during the query; `bucket` rounds it up. As
in the released code, heads are not split: one softmax over products of the full width. PruMerge+ (`spread: true`) adds
an even sample. With `step` the whole part of patches over outliers, it takes every int(step / 3)-th patch in raster
order from int(step / 6) on, at least every one; the released code leaves out the last patch, and fails where step < 3.

To every kept patch are added the 32 other patches of its view, kept or not, whose keys are most like its own, each
times what the class token gives it, and not normalised: the weights of a patch sum to more than 1. One token more holds
the sum of all that leave the view, weighted likewise. The released code appends it; here the best patch that would
leave stays as that token, at its own place. Where other stages or a fixed `keep` choose more or fewer, it is the last
one of the view that stays. A view that loses nothing stays as it is. So does one in which nothing stands out, where the
released code keeps that one token or, for PruMerge+, divides by zero.

The released code looks at the block behind the features, here it is the block they come from, as later ones do not run;
and tokens merge behind the projector. Where no tower has a class token, the attention a patch gets from all tokens,
mean over heads, takes its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from tokenprune import UNION, BackboneInfo, CutConfig, Keep, Plan, Proposal, Removal, SelectContext, StageNeeds
from tokenprune_plugins.shared.bases import Anywhere
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.shared.similarity import likeness, likeness_flops


class PruMergeConfig(CutConfig):
    """Which patches stay, and how many are merged into each."""

    keep: Keep = UNION
    spread: bool = Field(default=False, description="PruMerge+: keep an even sample of each view besides.")
    neighbours: int = Field(default=32, ge=0, description="Patches that are added to each kept one.")
    attention: Literal["auto", "cls", "received"] = Field(
        default="auto", description="From the class token or from all tokens; auto: the former where there is one."
    )


class PruMerge(Anywhere[PruMergeConfig]):
    """Keeps the patches whose attention stands out in their view, and merges the others into them."""

    Config = PruMergeConfig

    def bind(self, info: BackboneInfo) -> None:
        """Choose the attention."""
        self._kind = self._attention(info)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """One kind of attention, and keys of full width; what leaves is merged."""
        return replace(
            super().requirements(info), encoder_attention=(self._attention(info), "keys_whole"), removal=Removal.MERGE
        )

    def _attention(self, info: BackboneInfo) -> str:
        auto = "cls" if "cls_whole" in info.encoder_attention else "received"
        kind = auto if self.config.attention == "auto" else self.config.attention
        return "cls_whole" if kind == "cls" else kind

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention this is."""
        if self._attention(info) == "cls_whole":
            return "attention of the vision tower's class token, heads not split"
        return "attention from all tokens of the vision tower, mean over heads" + (
            ", which has no class token" if "cls_whole" not in info.encoder_attention else ""
        )

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of all pairs of keys, where anything leaves."""
        cuts = [cut for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return sum(likeness_flops(cut.found, info.encoder_attention["keys_whole"].width) for cut in cuts)

    def propose(self, ctx: SelectContext) -> Proposal:
        """Patches that stand out, and what the others are merged into."""
        attention, keys = ctx.encoder_attention(self._kind), ctx.encoder_attention("keys_whole")
        view = ctx.views_of
        wanted = standing_out(attention, view, len(ctx.layout.views), self.config.spread)
        score, protect = ranked(attention, view, wanted)

        def merge(chosen: Tensor) -> Tensor:
            return gathered(attention, likeness(keys), view, score, chosen, self.config.neighbours)

        return Proposal(score=score, protect=protect, merge=merge)


def standing_out(attention: Tensor, view: Tensor, views: int, spread: bool) -> Tensor:
    """Which patches stay as such, boolean `[B, P]`; all of a view in which none stands out.

    Args:
        attention: What each patch gets `[B, P]`.
        view: Number of each patch's view `[B, P]`.
        views: How many there are.
        spread: Whether an even sample of each view stays too.
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


def ranked(attention: Tensor, view: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[B, P]`, those of wanted patches higher, without ties; and which are protected `[B, P]`.

    Protected are the wanted ones and the best other one of each view, whose place the sum of the rest takes.
    """
    n = attention.shape[1]
    score = (n * wanted.long() + n - rank_within(attention)).to(torch.float32)
    beside = (view[:, :, None] == view[:, None]) & ~wanted[:, None]
    best = score[:, None].masked_fill(~beside, 0).amax(2)
    return score, wanted | (score == best)


def gathered(attention: Tensor, alike: Tensor, view: Tensor, score: Tensor, chosen: Tensor, neighbours: int) -> Tensor:
    """Weights `[B, K, P]` of what each kept patch becomes.

    Args:
        attention: What each patch gets `[B, P]`.
        alike: Likeness of each two patches `[B, P, P]`; of equals the lower index is nearer.
        view: Number of each patch's view `[B, P]`.
        score: By which patches stayed `[B, P]`, without ties.
        chosen: Kept patches `[B, K]`.
        neighbours: Patches added to each.
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
    near = alike.gather(1, chosen[..., None].expand(-1, -1, n)).masked_fill(~others, -torch.inf)
    nearest = near.argsort(dim=2, descending=True, stable=True)[:, :, :neighbours]
    close = torch.zeros_like(others).scatter(2, nearest, True) & others & lost
    given = attention[:, None]
    return torch.where(last, given * (rest | own), own + given * close)
