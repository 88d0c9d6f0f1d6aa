"""SparseVLM (arXiv 2410.04417): at three depths, keep the patches that the text's most visual tokens attend to.

Raters are chosen once, before layer 0: each patch spreads a softmax of its products with the text's embeddings over
the text; text tokens that get more than the mean are the raters. At layers 2, 6 and 15 of 32 a patch's score is the
raters' attention to it, mean over heads and raters. The released code keeps 300, 200 and 110 of 576 patches for what
it calls 192 tokens, their mean over layers; the paper's counts from the rank of the attention are not in the code.
Its second version looks only at the 14 heads in which the raters attend to patches most (`heads: 14`).

With `recycle`, the best 30 % of the tokens that would leave are clustered by density peaks, and each cluster stays as
its mean; those are counted in `keep`. The released code appends them behind the patches and renumbers all; here a mean
stands where its cluster's centre stood.
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
from tokenprune_plugins.shared.merging import into
from tokenprune_plugins.shared.recycling import fold, recycled
from tokenprune_plugins.shared.similarity import likeness_flops


class SparseVLMConfig(CutConfig):
    """Where patches leave; `keep` is a share of what each cut finds."""

    after: Cuts = ("6%", "19%", "47%")
    keep: Keep = (300 / 576, 200 / 300, 110 / 200)
    recycle: bool = Field(default=False, description="Whether the best of what leaves stays as means of clusters.")
    heads: int | None = Field(
        default=None, ge=1, description="Heads that count, those whose raters attend to patches most; all by default."
    )


class SparseVLM(Stage[SparseVLMConfig]):
    """Keeps what the raters among the text attend to."""

    Config = SparseVLMConfig

    def bind(self, info: BackboneInfo) -> None:
        """Refuse more heads than there are.

        Raises:
            ValueError: If `heads` is more than the decoder has.
        """
        if self.config.heads is not None and self.config.heads > info.decoder.heads:
            raise ValueError(f"heads: {self.config.heads}, but the decoder of '{info.name}' has {info.decoder.heads}")

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, and a look at the embeddings; what is recycled is merged."""
        return replace(
            super().requirements(info).also_called_after([-1]),
            removal=Removal.MERGE if self.config.recycle else Removal.DROP,
        )

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows, at every cut; those that are no raters do not count."""
        return tuple(Probe(layer, "text") for layer in self.requirements(info).layers if layer >= 0)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Products of patches and text, and distances of what is recycled."""
        width = info.decoder.hidden
        products = likeness_flops(len(plan.layout.prunable), width, len(plan.layout.span("text")))
        if not self.config.recycle:
            return products
        folded = [recycled(cut.found - cut.keep)[0] for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return products + sum(likeness_flops(n, width) for n in folded)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Choose the raters."""
        ctx.scratch["raters"] = raters(ctx.patches, ctx.rows("text"))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """What the raters attend to."""
        score = rated(ctx.attention_rows("text"), ctx.scratch["raters"], self.config.heads)
        cut = ctx.plan.cut_after[ctx.layer]
        if not self.config.recycle or cut.keep == cut.found:
            return Proposal(score=score)
        folded, clusters = recycled(cut.found - cut.keep)
        clusters = min(clusters, cut.keep)
        worth, destination, takes_part = fold(score, ctx.patches, cut.keep - clusters, folded, clusters)
        return Proposal(score=worth, merge=lambda chosen: into(destination, takes_part.to(worth.dtype), chosen))


def raters(patches: Tensor, text: Tensor) -> Tensor:
    """Which text tokens are looked through, boolean `[B, T]`, from embeddings `[B, P, D]` and `[B, T, D]`."""
    exact = torch.promote_types(patches.dtype, torch.float32)
    relevance = (patches.to(exact) @ text.to(exact).mT).softmax(-1).mean(1)
    chosen = relevance > relevance.mean(-1, keepdim=True)
    # Where all are equal, none is above the mean.
    return chosen | ~chosen.any(-1, keepdim=True)


def rated(attention: Tensor, rating: Tensor, heads: int | None) -> Tensor:
    """Scores `[B, P]`: attention `[B, H, T, P]`, mean over the raters `[B, T]` and over the heads that count."""
    weight = rating.to(attention.dtype)
    by_head = (attention * weight[:, None, :, None]).sum(2) / weight.sum(1)[:, None, None]
    if heads is not None:
        best = by_head.sum(2).topk(heads, dim=1).indices
        by_head = by_head.gather(1, best[..., None].expand(-1, -1, by_head.shape[2]))
    return by_head.mean(1)
