"""SpecPrune's static stage in its final released code (official revision 8091adc), for comparison only.

It keeps every patch that is not among the most similar ones, without an upper bound. It reads attention in rows that
are counted from fixed positions. In `fine` it keeps fewer patches than in `coarse`. The union that it keeps has no
fixed size. The page "SpecPrune: fidelity" of the documentation lists every difference from the paper and from
`specprune.static`.
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
"""Control steps whose frames are kept: the released look-back may reach the first frame of LIBERO's longest episode."""


class StaticC3Config(CutConfig):
    """The released constants, by mode and for each view in sequence order; the last value repeats for further views."""

    after: Cuts = (0, 1)
    keep: Keep = "union"
    local_top: PerMode = Field(
        default={"coarse": (24, 19), "fine": (15, 12)}, description="Top patches of each view by attention, by mode."
    )
    unchanged_cap: PerMode = Field(
        default={"coarse": (236, 230), "fine": (240, 236)},
        description="Most patches of each view that count as unchanged, by mode.",
    )
    unchanged: tuple[float, ...] = Field(
        default=(0.986, 0.98),
        min_length=1,
        description="Cosine similarity of a patch's pixels from which it counts as unchanged, for each view in "
        "sequence order; the last value repeats.",
    )
    previous_layers: Layers = Field(
        default=("44%", "94%"), description="Layers whose attention ranks patches in the next query."
    )
    first_step: int = Field(
        default=9, ge=0, description="Number of executed actions, from the first, that do not count as motion."
    )

    def modes(self) -> dict[str, set[str]]:
        """Modes of the budgets and of the constants."""
        return {**super().modes(), "local_top": set(self.local_top), "unchanged_cap": set(self.unchanged_cap)}


class StaticC3(Stage[StaticC3Config]):
    """Keeps the released code's union of changed, previously attended and attended patches after layers 0 and 1."""

    Config = StaticC3Config

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the previous layers in this decoder.

        Raises:
            ValueError: If the cuts are not after layers 0 and 1, where the released code cuts.
        """
        if self.cuts(info.decoder.depth) != (0, 1):
            raise ValueError("the released code cuts after layers 0 and 1 only; use specprune.static for other cuts")
        self._previous = layer_indices(self.config.previous_layers, info.decoder.depth, "previous_layers")
        self._translation = info.action.groups.get("translation", ())

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts after layers 0 and 1, the previous layers, and all frames of an episode."""
        needs = super().requirements(info).also_called_after(self._previous)
        return replace(needs, look_back_frames=WHOLE_EPISODE)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The released rows, which differ between layer 0, layer 1 and the previous layers."""
        rows_of = {0: _rows(layout, 0), 1: _rows(layout, 1), **dict.fromkeys(self._previous, _rows(layout, 2))}
        return tuple(Probe(layer, rows) for layer, rows in rows_of.items())

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int:
        """Control steps to the frame that the released code indexes; at 0 the frame is compared with itself."""
        skipped = max(self.config.first_step - (len(ctx.executed) - len(ctx.since_query)), 0)
        distance = signals.travelled(ctx.since_query[skipped:], self._translation)
        index = min(math.trunc(22 / 3 - 16 / 3 * distance / 6) + 3, 6)
        now = len(ctx.executed)
        if index > now + 1:
            return 0
        return index - 1 if index > 0 else max(now + index, 0)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Propose the union after layers 0 and 1; remember the attention of previous layers for the next query."""
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
        """Changed patches `[B, P]`: all but the most similar ones of each view."""
        similarity, found = frame_similarity(ctx, black=0.0)
        size = torch.zeros_like(similarity)
        for view in ctx.layout.views:
            inside = ctx.in_view(view)
            size = torch.where(inside, inside.sum(1, keepdim=True).double(), size)
        least = size - per_view(ctx, self.config.unchanged_cap[ctx.mode])
        below = similarity < per_view(ctx, self.config.unchanged)
        return (below | (rank_in_views(ctx, -similarity) < least)) & found[:, None]

    def _before(self, ctx: LayerContext) -> Tensor:
        """Top patches `[B, P]` of the previous query's attention; a patch pruned before that layer has attention 0."""
        half = ctx.recall("top")[0].div(2, rounding_mode="floor")
        chosen = torch.zeros_like(ctx.prunable, dtype=torch.bool)
        for layer in self._previous:
            attended, _ = ctx.recall(f"previous.{layer}")
            chosen = chosen | (rank_in_views(ctx, attended) < half)
        return chosen


def _rows(layout: TokenLayout, which: int) -> range:
    """Query rows of layer 0 (`which` 0), layer 1 (1) and the previous layers (2), as the released code counts them.

    The released code reads positions 523 to the second-to-last prompt token, then the same range shifted by one, then
    522 to 546; its task description begins at 523. After a short prompt the last range may include action placeholders.
    """
    task, end = layout.span("instruction").start, layout.span("text").stop
    if which < 2:
        return range(task + which, end - 1 + which)
    return range(task - 1, min(task + 24, layout.n_tokens))
