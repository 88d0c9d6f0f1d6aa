"""TTF-VLA (arXiv 2508.19257): patches that did not change keep the features of the last query.

A patch's features are new if the grey values of its pixels changed by more than `threshold` of their range on average,
or if it is among the `attended_top` patches that the text attended to most in the last query (layer 15 of 32, mean over
heads and text, over all views together). All others keep the features the last query used. Every `keyframe`-th query
takes all features anew; the released code's default is 5, the paper's 3. Values are replaced and no token leaves, so
nothing becomes faster. The released code masks its two towers separately; here both have the same mask.
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


class TTFConfig(StageConfig):
    """When features are taken anew."""

    threshold: float = Field(
        default=0.03, ge=0, le=1, description="Mean change of grey values from which a patch changed."
    )
    attended_top: int = Field(default=70, ge=0, description="Patches that text attended to most, which are always new.")
    attended_layer: Layer = Field(default="47%", description="Layer whose attention says so.")
    keyframe: int = Field(default=5, ge=1, description="Every so many queries all features are new.")


class TTF(Stage[TTFConfig]):
    """Keeps the features of patches that neither changed nor matter."""

    Config = TTFConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find the layer in this decoder."""
        self._layer = layer_index(self.config.attended_layer, info.decoder.depth, "attended_layer")

    def host_state(self, slot: Slot) -> bool:
        """Whether the query is a keyframe."""
        return slot.queries % self.config.keyframe == 0

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The layer that says what matters."""
        return super().requirements(info).also_called_after([self._layer])

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The text's rows."""
        return (Probe(self._layer, "text"),)

    @hookimpl
    def transform_features(self, ctx: FeatureContext) -> Tensor:
        """New features where they are needed, the last query's elsewhere."""
        before, had = ctx.previous_features()
        earlier, _ = ctx.previous_images()
        # How much is the best of a view is not known before all views are seen; the map of all of them is.
        attended, _ = ctx.recall("attended")
        key = flags([self.host_state(slot) for slot in ctx.slots], had.device) | ~had
        moved = changed(ctx.images, earlier, ctx.layout.views[ctx.view].grid, ctx.features.shape[1])
        new = (moved > self.config.threshold) | (attended > 0) | key[:, None]
        return torch.where(new[..., None], ctx.features, before)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> None:
        """Note which patches of all views the text attends to most."""
        given = ctx.attention_rows("text").mean((1, 2))
        order = given.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(given).scatter(1, order[:, : self.config.attended_top], 1.0)
        ctx.remember("attended", best)


def changed(now: Tensor, then: Tensor, grid: tuple[int, int] | None, patches: int) -> Tensor:
    """Mean change of the grey values of each patch `[B, N]`, 0 to 1, of pixels uint8 `[B, 3, S, S]`."""
    weights = torch.stack([torch.full((), part, device=now.device) for part in (0.299, 0.587, 0.114)])[:, None, None]
    grey, before = ((pixels.float() / 255 * weights).sum(1, keepdim=True) for pixels in (now, then))
    return adaptive_avg_pool2d((grey - before).abs(), grid or (1, patches)).flatten(1)
