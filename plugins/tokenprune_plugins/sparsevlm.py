"""SparseVLM (arXiv 2410.04417): at three depths, keep the patches that the most visual text tokens attend to.

These text tokens, the raters, are chosen once before layer 0: for each patch a softmax over the text of the products
of embeddings, then the mean over patches; the raters are the text tokens above the mean. At layers 2, 6 and 15 of 32
the score of a patch is the attention it gets from the raters, mean over heads and raters. The released code keeps 300,
200 and 110 of 576 patches and calls this 192 tokens, their mean over layers; the paper derives counts from the rank of
the attention matrix, which the code does not. The code's second version reads only the 14 heads in which the raters
attend to patches most (`heads: 14`).

With `recycle`, the best 30 % of the tokens that would leave are clustered by density peaks, and each cluster stays as
its mean; these means count in `keep`. The released code appends them after the patches and renumbers all tokens; here
a mean takes the position of its cluster's centre.
"""

from __future__ import annotations

from dataclasses import replace

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
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
)
from tokenprune_plugins.shared.merging import merge_weights
from tokenprune_plugins.shared.recycling import recycle, recycling_counts
from tokenprune_plugins.shared.similarity import similarity_flops


class SparseVLMConfig(CutConfig):
    """Where patches leave and how they are scored; `keep` is a share of the tokens that each cut finds."""

    after: Cuts = ("6%", "19%", "47%")
    keep: Keep = (300 / 576, 200 / 300, 110 / 200)
    recycle: bool = Field(
        default=False,
        description="Keep the best of the tokens that would leave as means of clusters, counted in `keep`.",
    )
    heads: int | None = Field(
        default=None, ge=1, description="Heads to read: those in which raters attend to patches most; all by default."
    )


class SparseVLM(Stage[SparseVLMConfig]):
    """Keeps the patches that get the most attention from the most visual text tokens, the raters."""

    Config = SparseVLMConfig

    def bind(self, info: BackboneInfo) -> None:
        """Check the number of heads.

        Raises:
            ValueError: If `heads` is more than the decoder has.
        """
        if self.config.heads is not None and self.config.heads > info.decoder.heads:
            raise ValueError(f"heads: {self.config.heads}, but the decoder of '{info.name}' has {info.decoder.heads}")

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and a call before layer 0 to choose the raters; recycled tokens are merged."""
        return replace(
            super().requirements(info).also_called_after([-1]),
            removal=Removal.MERGE if self.config.recycle else Removal.DROP,
        )

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows at every cut, of which the raters' are used."""
        return tuple(Probe(layer, "text") for layer in self.requirements(info).layers if layer >= 0)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the products of patches and text, and of the distances of recycled tokens."""
        width = info.decoder.hidden
        products = similarity_flops(len(plan.layout.prunable), width, len(plan.layout.span("text")))
        if not self.config.recycle:
            return products
        recycled = [recycling_counts(cut.found - cut.keep)[0] for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return products + sum(similarity_flops(n, width) for n in recycled)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Choose the raters."""
        ctx.scratch["raters"] = raters(ctx.patches, ctx.rows("text"))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Score patches by the raters' attention; with `recycle`, merge the best that leave."""
        score = rater_scores(ctx.attention_rows("text"), ctx.scratch["raters"], self.config.heads)
        cut = ctx.plan.cut_after[ctx.layer]
        if not self.config.recycle or cut.keep == cut.found:
            return Proposal(score=score)
        recycled, clusters = recycling_counts(cut.found - cut.keep)
        clusters = min(clusters, cut.keep)
        score, destination, member = recycle(score, ctx.patches, cut.keep - clusters, recycled, clusters)
        size = member.to(score.dtype)
        return Proposal(score=score, merge=lambda chosen: merge_weights(destination, size, chosen))


def raters(patches: Tensor, text: Tensor) -> Tensor:
    """Text tokens that rate patches, boolean `[B, T]`; all of them where they are equally visual.

    Args:
        patches: Embeddings of the patches `[B, P, D]`.
        text: Embeddings of the text tokens `[B, T, D]`.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    relevance = (patches.to(dtype) @ text.to(dtype).mT).softmax(-1).mean(1)
    chosen = relevance > relevance.mean(-1, keepdim=True)
    return chosen | ~chosen.any(-1, keepdim=True)


def rater_scores(attention: Tensor, rater: Tensor, heads: int | None) -> Tensor:
    """Scores `[B, P]`: the raters' attention, mean over raters and heads.

    Args:
        attention: Attention of the text tokens to the patches `[B, H, T, P]`.
        rater: Which text tokens are raters, boolean `[B, T]`.
        heads: Number of heads to average, those in which the raters attend to patches most; None for all.
    """
    weight = rater.to(attention.dtype)
    by_head = (attention * weight[:, None, :, None]).sum(2) / weight.sum(1)[:, None, None]
    if heads is not None:
        best = by_head.sum(2).topk(heads, dim=1).indices
        by_head = by_head.gather(1, best[..., None].expand(-1, -1, by_head.shape[2]))
    return by_head.mean(1)
