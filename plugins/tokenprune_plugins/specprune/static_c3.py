"""SpecPrune's static stage as its final released code runs it (official revision 8091adc), for comparison only.

It keeps every patch that is not among the most similar ones, without an upper bound; reads attention in rows that are
counted from fixed positions; and in `fine` keeps fewer patches than in `coarse`. The union it keeps has no fixed size.
The page "SpecPrune: fidelity" of the documentation lists every difference from the paper and from `specprune.static`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    ControlContext,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Layers,
    Probe,
    Proposal,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
    layer_indices,
)
from tokenprune_plugins.shared.attention_rows import attention_to_patches
from tokenprune_plugins.shared.patch_change import frame_similarity
from tokenprune_plugins.shared.ranks import per_view, rank_in_views
from tokenprune_plugins.specprune import signals

PerView = Annotated[tuple[int, ...], Field(min_length=1)]
PerMode = dict[str, PerView]
WHOLE_EPISODE = 600
"""Control steps that are kept, for the released look-back may name the first frames of the longest LIBERO episode."""


class StaticC3Config(CutConfig):
    """The released constants, per mode and per view in sequence order; the last value repeats for further views."""

    after: Cuts = (0, 1)
    keep: Keep = "union"
    local_top: PerMode = Field(
        default={"coarse": (24, 19), "fine": (15, 12)}, description="Patches each of the two layers attends to."
    )
    unchanged_cap: PerMode = Field(
        default={"coarse": (236, 230), "fine": (240, 236)}, description="Most patches that may count as unchanged."
    )
    unchanged: tuple[float, ...] = Field(
        default=(0.986, 0.98),
        min_length=1,
        description="Cosine from which a patch counts as unchanged, per view in sequence order; the last repeats.",
    )
    previous_layers: Layers = ("44%", "94%")
    first_step: int = Field(default=9, ge=0, description="Executed actions before this one do not count as motion.")

    def modes(self) -> dict[str, set[str]]:
        """Modes of the budgets and of the constants."""
        return {**super().modes(), "local_top": set(self.local_top), "unchanged_cap": set(self.unchanged_cap)}


class StaticC3(Stage[StaticC3Config]):
    """The released selection after layers 0 and 1."""

    Config = StaticC3Config

    def bind(self, info: BackboneInfo) -> None:
        """Find the remembered layers in this decoder.

        Raises:
            ValueError: If the cuts are not after layers 0 and 1, the only ones the released code knows.
        """
        if self.cuts(info.decoder.depth) != (0, 1):
            raise ValueError("the released code cuts after layers 0 and 1; specprune.static cuts anywhere")
        self._previous = layer_indices(self.config.previous_layers, info.decoder.depth, "previous_layers")
        self._translation = info.action.groups.get("translation", ())

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """Layers 0 and 1, those remembered, and every frame of an episode."""
        needs = super().requirements(info).also_called_after(self._previous)
        return replace(needs, look_back_frames=WHOLE_EPISODE)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """Rows that differ from layer to layer."""
        rows = {0: _rows(layout, 0), 1: _rows(layout, 1), **dict.fromkeys(self._previous, _rows(layout, 2))}
        return tuple(Probe(layer, asked) for layer, asked in rows.items())

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int:
        """The released index into the frames so far; 0 is the current frame, which then is compared with itself."""
        skipped = max(self.config.first_step - (len(ctx.executed) - len(ctx.since_query)), 0)
        distance = signals.travelled(ctx.since_query[skipped:], self._translation)
        index = min(math.trunc(22 / 3 - 16 / 3 * distance / 6) + 3, 6)
        now = len(ctx.executed)
        if index > now + 1:
            return 0
        return index - 1 if index > 0 else max(now + index, 0)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """After layers 0 and 1 the union, later what the next query is to know."""
        proposal = None
        if ctx.layer <= 1:
            proposal = self._select(ctx)
        if ctx.layer in self._previous:
            ctx.remember(f"previous.{ctx.layer}", attention_to_patches(ctx, _rows(ctx.layout, 2)))
        return proposal

    def _select(self, ctx: LayerContext) -> Proposal:
        attended = attention_to_patches(ctx, _rows(ctx.layout, ctx.layer))
        ranks, top = rank_in_views(ctx, attended), per_view(ctx, self.config.local_top[ctx.mode])
        if ctx.layer == 0:
            kept = {"dynamic": self._changed(ctx), "previous": self._before(ctx)}
            ctx.remember("top", top)
            for reason, member in kept.items():
                ctx.remember(reason, member.double())
            ctx.remember("local", (ranks < top).double())
            kept["local"] = ranks < 2 * top
        else:
            kept = {reason: ctx.recall(reason)[0] > 0 for reason in ("dynamic", "previous", "local")}
            kept["local"] = kept["local"] | (ranks < top)
        return Proposal(score=attended, protect=torch.stack(list(kept.values())).any(0), reasons=kept)

    def _changed(self, ctx: LayerContext) -> Tensor:
        """All but the most similar patches of each view."""
        similar, found = frame_similarity(ctx, black=0.0)
        size = torch.zeros_like(similar)
        for view in ctx.layout.views:
            inside = ctx.in_view(view)
            size = torch.where(inside, inside.sum(1, keepdim=True).double(), size)
        least = size - per_view(ctx, self.config.unchanged_cap[ctx.mode])
        below = similar < per_view(ctx, self.config.unchanged)
        return (below | (rank_in_views(ctx, -similar) < least)) & found[:, None]

    def _before(self, ctx: LayerContext) -> Tensor:
        """What the layers of the previous query attended to; a token it had pruned by then counts as 0 attention."""
        half = ctx.recall("top")[0].div(2, rounding_mode="floor")
        chosen = torch.zeros_like(ctx.prunable, dtype=torch.bool)
        for layer in self._previous:
            attended, _ = ctx.recall(f"previous.{layer}")
            chosen = chosen | (rank_in_views(ctx, attended) < half)
        return chosen


def _rows(layout: TokenLayout, which: int) -> range:
    """Query rows of layer 0, of layer 1, and of the remembered layers, where upstream's fixed positions lie.

    Upstream takes positions 523 up to the last prompt token but one, then the same shifted by one, then 522 to 546, and
    its task description begins at 523. The last range may reach action placeholders behind a short prompt.
    """
    task, end = layout.span("instruction").start, layout.span("text").stop
    if which < 2:
        return range(task + which, end - 1 + which)
    return range(task - 1, min(task + 24, layout.n_tokens))
