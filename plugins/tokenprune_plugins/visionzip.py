"""VisionZip (arXiv 2412.04467): dominant patches as they are, and the rest folded into a few contextual ones.

Dominant are the patches that the vision tower's class token attends to most, summed over heads. Of the others,
`contextual` evenly spaced ones become targets; every remaining patch goes to the target whose key in the tower (mean
over heads) is most like its own, and the mean of those that came is added to the target. Here that happens behind the
projector, which works patch by patch, and once over all views. Where no tower has a class token, the attention a patch
gets from all tokens takes its place. The released code keeps 191 + 30 of 576 patches at most, its class token not
counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    CutConfig,
    Keep,
    Plan,
    Proposal,
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    hookimpl,
)
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.shared.similarity import likeness, likeness_flops


class VisionZipConfig(CutConfig):
    """How many tokens stay, contextual ones among them."""

    keep: Keep = 0.25
    contextual: float = Field(default=30 / 221, ge=0, lt=1, description="Share of the kept tokens that is contextual.")
    attention: Literal["auto", "cls", "received"] = Field(
        default="auto", description="From the class token or from all tokens; auto: the former where there is one."
    )


class VisionZip(Stage[VisionZipConfig]):
    """Keeps what the vision tower attends to, and folds the rest into a few targets."""

    Config = VisionZipConfig

    def bind(self, info: BackboneInfo) -> None:
        """Choose the attention."""
        self._kind = self._attention(info)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """One kind of attention, and keys; what leaves is folded into a target."""
        return replace(
            super().requirements(info), encoder_attention=(self._attention(info), "keys"), removal=Removal.MERGE
        )

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention this is."""
        return {
            "cls": "attention of the vision tower's class token",
            "received": "attention from all tokens of the vision tower",
        }[self._attention(info)]

    def _attention(self, info: BackboneInfo) -> str:
        auto = "cls" if "cls" in info.encoder_attention else "received"
        return auto if self.config.attention == "auto" else self.config.attention

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of all pairs of keys."""
        width = info.encoder_attention["keys"].width
        return sum(likeness_flops(cut.found, width) for cut in self.own_cuts(plan))

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Dominant and contextual tokens."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        contextual = min(round(self.config.contextual * keep), keep)
        score, target = zipped(ctx.encoder_attention(self._kind), keep - contextual, contextual)
        alike = likeness(ctx.encoder_attention("keys"))

        def merge(chosen: Tensor) -> Tensor:
            return folded(alike, target, chosen)

        return Proposal(score=score, merge=merge)


def zipped(attention: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, P]`, highest for dominant patches, then for evenly spaced ones of the rest; and which these are.

    Args:
        attention: What each patch gets `[B, P]`; of equals the lower index is dominant.
        dominant: Patches kept as they are.
        contextual: Targets.
    """
    n = attention.shape[1]
    rank = rank_within(attention)
    rest = rank >= dominant
    order = rest.long().cumsum(1) - 1
    stride = max((n - dominant) // max(contextual, 1), 1)
    target = rest & (order % stride == 0) & (order < stride * contextual)
    score = torch.where(rest, target.float(), 3 - rank.float() / n)
    return score, target


def folded(alike: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]`: every kept token itself, and to a target the mean of those that are most like it.

    Args:
        alike: Likeness of each two patches `[B, P, P]`.
        target: Which are targets `[B, P]`.
        chosen: Kept patches `[B, K]`.
    """
    n = alike.shape[1]
    kept = torch.zeros_like(target).scatter(1, chosen, True)
    goes = alike.masked_fill(~(target & kept)[:, None], -torch.inf).argmax(2)
    leaves = ~kept & (target & kept).any(1, keepdim=True)
    comes = torch.nn.functional.one_hot(goes, n).mT.to(alike.dtype) * leaves[:, None]
    comes = comes / comes.sum(2, keepdim=True).clamp(min=1)
    every = torch.eye(n, dtype=alike.dtype, device=alike.device) + comes
    return every.gather(1, chosen[..., None].expand(-1, -1, n))
