"""VisionZip (arXiv 2412.04467): keep dominant patches unchanged, and merge the rest into a few contextual tokens.

Dominant patches are those that the vision tower's class token attends to most, over all heads. Of the other patches,
evenly spaced ones become contextual tokens, a share `contextual` of all kept tokens. Each patch that leaves is assigned
to the contextual token whose key in the vision tower (mean over heads) is most similar to its own, and the mean of the
assigned patches is added to that token. Here tokens merge behind the projector, which works patch by patch, and all
views are merged together. Where no tower has a class token, the attention that a patch gets from all tokens is used
instead. The released code keeps at most 191 + 30 of 576 patches, not counting its class token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

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
from tokenprune_plugins.shared.similarity import pairwise_cosine, similarity_flops
from tokenprune_plugins.shared.tower_attention import AttentionOrAuto, attention_caveat, attention_kind


class VisionZipConfig(CutConfig):
    """How many tokens stay, including the contextual ones, and which attention chooses the dominant ones."""

    keep: Keep = 0.25
    contextual: float = Field(default=30 / 221, ge=0, lt=1, description="Share of the kept tokens that are contextual.")
    attention: AttentionOrAuto = "auto"


class VisionZip(Stage[VisionZipConfig]):
    """Keeps the patches that the vision tower attends to most, and merges the rest into a few contextual tokens."""

    Config = VisionZipConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve which attention is read on this backbone."""
        self._kind = attention_kind(self.config.attention, info)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, the attention and the keys of the vision tower; tokens that leave are merged."""
        return replace(super().requirements(info), encoder_attention=(self._kind, "keys"), removal=Removal.MERGE)

    def caveats(self, info: BackboneInfo) -> str:
        """Which attention is read on this backbone."""
        return attention_caveat(self.config.attention, info)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of all pairs of keys."""
        width = info.encoder_attention["keys"].width
        return sum(similarity_flops(cut.found, width) for cut in self.own_cuts(plan))

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Score dominant patches highest and contextual tokens next, and merge the rest into the latter."""
        keep = ctx.plan.cut_after[ctx.layer].keep
        contextual = min(round(self.config.contextual * keep), keep)
        score, target = dominant_and_contextual(ctx.encoder_attention(self._kind), keep - contextual, contextual)
        similarity = pairwise_cosine(ctx.encoder_attention("keys"))
        return Proposal(score=score, merge=lambda chosen: contextual_weights(similarity, target, chosen))


def dominant_and_contextual(attention: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, P]`, highest for dominant patches and next for contextual ones; and which are contextual `[B, P]`.

    Args:
        attention: Attention that each patch gets `[B, P]`; of equal ones the lower index is dominant.
        dominant: Number of dominant patches.
        contextual: Number of contextual patches, evenly spaced among the others.
    """
    n = attention.shape[1]
    rank = rank_within(attention)
    rest = rank >= dominant
    order = rest.long().cumsum(1) - 1
    stride = max((n - dominant) // max(contextual, 1), 1)
    target = rest & (order % stride == 0) & (order < stride * contextual)
    score = torch.where(rest, target.float(), 3 - rank.float() / n)
    return score, target


def contextual_weights(similarity: Tensor, target: Tensor, chosen: Tensor) -> Tensor:
    """Weights `[B, K, P]`: each kept token itself, and in a contextual one also the mean of the patches assigned to it.

    Args:
        similarity: Cosine similarity of every pair of patches `[B, P, P]`.
        target: Which patches are contextual `[B, P]`.
        chosen: Kept patches `[B, K]`.
    """
    n = similarity.shape[1]
    kept = torch.zeros_like(target).scatter(1, chosen, True)
    destination = similarity.masked_fill(~(target & kept)[:, None], -torch.inf).argmax(2)
    leaves = ~kept & (target & kept).any(1, keepdim=True)
    assigned = one_hot(destination, n).mT.to(similarity.dtype) * leaves[:, None]
    assigned = assigned / assigned.sum(2, keepdim=True).clamp(min=1)
    weights = torch.eye(n, dtype=similarity.dtype, device=similarity.device) + assigned
    return weights.gather(1, chosen[..., None].expand(-1, -1, n))
