"""TTF-VLA (arXiv 2508.19257): patches that did not change reuse the features of the last query.

A patch gets new features if its grey values changed by more than `threshold` of their range, mean over its pixels, or
if it is among the `attended_top` patches that the text attended to most in the last query (layer 15 of 32, mean over
heads and text, all views ranked together). All other patches reuse the features that the last query used. Every
`keyframe`-th query uses new features everywhere; the released code's default is 5, the paper's 3. Features are replaced
and no token leaves, so queries do not become faster. The released code has a mask for each of its two towers; here both
share one.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokenprune import (
    BackboneInfo,
    FeatureContext,
    Layer,
    LayerContext,
    Probe,
    Slot,
    Stage,
    StageConfig,
    StageNeeds,
    TokenLayout,
    flags,
    hookimpl,
    layer_index,
)
from tokenprune_plugins.shared.attention_rows import attention_to_patches


class TTFConfig(StageConfig):
    """Which patches get new features."""

    threshold: float = Field(
        default=0.03, ge=0, le=1, description="Mean change of grey values above which a patch counts as changed."
    )
    attended_top: int = Field(
        default=70, ge=0, description="Patches that the text attended to most, which always get new features."
    )
    attended_layer: Layer = Field(default="47%", description="Layer whose attention ranks patches for `attended_top`.")
    keyframe: int = Field(default=5, ge=1, description="One query of this many uses new features for all patches.")


class TTF(Stage[TTFConfig]):
    """Reuses the features of patches that neither changed nor got much attention from the text."""

    Config = TTFConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the attention layer in this decoder."""
        self._layer = layer_index(self.config.attended_layer, info.decoder.depth, "attended_layer")

    def host_state(self, slot: Slot) -> bool:
        """Whether the query is a keyframe."""
        return slot.queries % self.config.keyframe == 0

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """A call after the attention layer."""
        return super().requirements(info).also_called_after([self._layer])

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows at the attention layer."""
        return (Probe(self._layer, "text"),)

    @hookimpl
    def transform_features(self, ctx: FeatureContext) -> Tensor:
        """New features of changed and attended patches and in keyframes, the last query's features elsewhere."""
        previous, had_one = ctx.previous_features()
        previous_images, _ = ctx.previous_images()
        attended, _ = ctx.recall("attended")
        keyframe = flags([self.host_state(slot) for slot in ctx.slots], had_one.device) | ~had_one
        change = grey_change(ctx.images, previous_images, ctx.layout.views[ctx.view].grid, ctx.features.shape[1])
        new = (change > self.config.threshold) | (attended > 0) | keyframe[:, None]
        return torch.where(new[..., None], ctx.features, previous)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> None:
        """Remember which patches of all views the text attends to most."""
        # The hook on features sees one view at a time, so the ranking over all views is made here.
        attention = attention_to_patches(ctx, "text")
        order = attention.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(attention).scatter(1, order[:, : self.config.attended_top], 1.0)
        ctx.remember("attended", best)


def grey_change(current: Tensor, previous: Tensor, grid: tuple[int, int] | None, patches: int) -> Tensor:
    """Mean absolute change of the grey values of each patch, 0 to 1, `[B, N]`.

    Args:
        current: Pixels of this query, uint8 `[B, 3, S, S]`.
        previous: Pixels of the last query, uint8 `[B, 3, S, S]`.
        grid: Rows and columns of patches; None for a view whose patches form no grid.
        patches: Number of patches.
    """
    luma = (0.299, 0.587, 0.114)
    weights = torch.stack([torch.full((), part, device=current.device) for part in luma])[:, None, None]
    grey, before = ((pixels.float() / 255 * weights).sum(1, keepdim=True) for pixels in (current, previous))
    return adaptive_avg_pool2d((grey - before).abs(), grid or (1, patches)).flatten(1)
