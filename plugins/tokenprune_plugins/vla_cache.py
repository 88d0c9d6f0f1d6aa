"""VLA-Cache (arXiv 2502.02175): patches that did not change reuse their keys and values of the last query.

A patch is static if its pixels have a cosine similarity of at least `unchanged` to those of the last query; at most the
`top` most similar patches of each camera count as static. The `relevant_top` patches that the text attended to most in
the last query (layer 15 of 32, mean over heads and text) are never static. From each cut on, a share of the static
patches is no longer computed; their keys and values of the last query stay in the KV cache. A patch that is reused from
one cut on is reused at all later layers, so a later cut changes something only if its share is larger.

The share of a layer is 1 minus its attention entropy, scaled to 0..1 over all layers; an increase from one layer to the
next is damped by 0.55. The released code measures entropies in every query; here they are measured in the first query
of an episode, which reuses nothing. The released code reuses the patches of lowest index, which are the top rows of the
first camera; here the most similar patches are reused first. In the view of a camera that moves with the arm, hardly
any patch is static.
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
    Layer,
    LayerContext,
    Probe,
    Proposal,
    Removal,
    SelectContext,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
    layer_index,
)
from tokenprune_plugins.shared.patch_change import patch_similarity
from tokenprune_plugins.shared.ranks import rank_in_views, rank_within


class VLACacheConfig(CutConfig):
    """Where patches stop being computed, and which patches may."""

    after: Cuts = ("4%", "16%", "25%", "31%")
    keep: Keep = "union"
    unchanged: float = Field(
        default=0.996, description="Cosine similarity of a patch's pixels to the last query from which it is static."
    )
    top: int = Field(default=100, ge=0, description="Maximum of static patches per camera, the most similar ones.")
    relevant_top: int = Field(
        default=100, ge=0, description="Patches that the text attended to most, which are always computed."
    )
    relevant_layer: Layer = Field(default="47%", description="Layer whose attention ranks patches for `relevant_top`.")
    shares: tuple[float, ...] | None = Field(
        default=None, description="Share of the static patches that is reused from each cut on; measured if left out."
    )
    damping: float = Field(
        default=0.55, ge=0, le=1, description="Factor on each increase of a measured share from layer to layer."
    )


class VLACache(Stage[VLACacheConfig]):
    """Reuses keys and values of the last query for patches that look the same, and does not compute these patches."""

    Config = VLACacheConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the layers in this decoder.

        Raises:
            ValueError: If `shares` does not give one number from 0 to 1 for each cut.
        """
        shares = self.config.shares
        if shares is not None and (len(shares) != len(self.config.after) or not all(0 <= s <= 1 for s in shares)):
            raise ValueError(f"shares: give one from 0 to 1 for each of the {len(self.config.after)} cuts")
        self._depth = info.decoder.depth
        self._relevant = layer_index(self.config.relevant_layer, self._depth, "relevant_layer")
        self._cuts = self.cuts(self._depth)
        self._measured = range(self._depth - 1) if shares is None else range(0)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, a call before layer 0 to compare pictures, the relevance layer, and the layers that are measured.

        Tokens that leave are reused: later layers still attend to them.
        """
        needs = super().requirements(info).also_called_after([-1, self._relevant, *self._measured])
        return replace(needs, removal=Removal.REUSE)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows at the relevance layer; entropies, measured once per episode, are not counted."""
        return (Probe(self._relevant, "text"),)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Rank the static patches."""
        similar = ctx.prunable.double() * 0 - 1
        for view, segment in ctx.layout.views.items():
            if segment.grid is not None:
                past, had = ctx.previous_images(view)
                same = patch_similarity(ctx.images[view], past, segment.grid)
                columns = (ctx.prunable - segment.start).clamp(0, segment.length - 1)
                similar = torch.where(ctx.in_view(view) & had[:, None], same.gather(1, columns), similar)
        attended, known = ctx.recall("relevant")
        relevant = rank_within(attended, known) < self.config.relevant_top
        static = similar >= self.config.unchanged
        static = static & (rank_in_views(ctx, similar, static) < self.config.top) & ~relevant
        ctx.scratch["rank"] = rank_within(similar, static)
        ctx.scratch["static"] = static.sum(1)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Measure entropy, remember the text's attention, and propose which patches are still computed."""
        if ctx.layer in self._measured:
            ctx.once(f"entropy.{ctx.layer}", ctx.row_entropy)
        if ctx.layer == self._relevant:
            attention = ctx.attention_to_all("text").mean((1, 2))
            ctx.remember("relevant", attention, of_all=True)
        if ctx.layer not in self._cuts:
            return None
        if any(slot.queries == 0 for slot in ctx.slots):
            # There is nothing to reuse yet, and deeper layers are still to be measured on all tokens.
            return Proposal(protect=torch.ones_like(ctx.prunable, dtype=torch.bool))
        rank = ctx.scratch["rank"].gather(1, ctx.places)
        reused = (self._share(ctx) * ctx.scratch["static"]).floor()
        return Proposal(score=rank.double(), protect=rank >= reused[:, None])

    def _share(self, ctx: LayerContext) -> Tensor:
        """Share of the static patches `[B]` that is reused from this cut on."""
        place = self._cuts.index(ctx.layer)
        if self.config.shares is not None:
            return torch.full_like(ctx.scratch["static"], self.config.shares[place], dtype=torch.float64)
        if not place:
            entropies = [ctx.once(f"entropy.{layer}", ctx.row_entropy) for layer in self._measured]
            measured = reuse_shares(torch.stack(entropies), self.config.damping)
            ctx.scratch["shares"] = torch.stack([measured[cut] for cut in self._cuts])
        return ctx.scratch["shares"][place]


def reuse_shares(entropies: Tensor, damping: float) -> Tensor:
    """Share of static patches that each layer reuses `[L, B]`: the lower the attention entropy, the larger.

    Args:
        entropies: Attention entropy of each layer `[L, B]`.
        damping: Factor on each increase from one layer to the next.
    """
    low, high = entropies.amin(0), entropies.amax(0)
    raw = 1 - (entropies - low) / (high - low).clamp(min=1e-12)
    damped = [raw[0]]
    for share in raw[1:]:
        damped.append(torch.where(share > damped[-1], damped[-1] + damping * (share - damped[-1]), share))
    return torch.stack(damped)
