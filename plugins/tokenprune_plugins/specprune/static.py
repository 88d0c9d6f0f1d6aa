"""SpecPrune's static stage (arXiv 2509.05614, section on static pruning): which patches this query can do without.

A patch stays if it changed since an earlier frame, was attended to in the previous query, or is attended to by the
instruction in the first layers: the union of the best few of each. Each signal orders the patches of a view; a patch
claims its place in the best of these orders, relative to the signal's `top`. Claims up to `alpha` are the union; under
a fixed budget the order of claims goes on where the union ends, so an episode's first query, which has neither an
earlier frame nor an earlier query, spends the same budget on the layers' attention alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune import (
    UNION,
    BackboneInfo,
    ControlContext,
    CutConfig,
    Cuts,
    Keep,
    LayerContext,
    Layers,
    Probe,
    Proposal,
    SelectContext,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
    layer_indices,
)
from tokenprune_plugins.shared.attention_rows import attention_to_patches
from tokenprune_plugins.shared.grid import grid_scores
from tokenprune_plugins.shared.patch_change import frame_similarity
from tokenprune_plugins.shared.ranks import claims, per_view
from tokenprune_plugins.specprune import signals

Top = Annotated[int, Field(ge=1)]
REASONS = ("dynamic", "previous", "local")


class StaticConfig(CutConfig):
    """The constants of the static stage; the defaults are the third version's where it gives them."""

    after: Cuts = (0, 1)
    keep: Keep = "union"
    alpha: float | dict[str, float] = Field(default=0.8, description="The union is of the best alpha * top of each.")
    local_layers: Layers = Field(default=(0, 1), description="Layers whose attention ranks patches.")
    local_top: Top = Field(default=24, description="Patches per view and layer.")
    previous_layers: Layers = Field(default=("44%", "97%"), description="Layers remembered for the next query.")
    previous_top: Top = Field(default=30, description="Patches per view and layer.")
    changed_top: Top = Field(default=20, description="Patches per view.")
    unchanged: tuple[float, ...] = Field(
        default=(0.986, 0.98),
        min_length=1,
        description="Cosine from which a patch counts as unchanged, per view in sequence order; the last repeats.",
    )
    rows: Literal["instruction", "text", "last"] = Field(default="instruction", description="Queries that attend.")

    def modes(self) -> dict[str, set[str]]:
        """Modes of the budgets, and of alpha."""
        own = {"alpha": set(self.alpha)} if isinstance(self.alpha, dict) else {}
        return {**super().modes(), **own}


class Static(Stage[StaticConfig]):
    """Keeps patches that changed, that the previous query attended to, or that the first layers attend to."""

    Config = StaticConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find the layers in this decoder, and the translation among its actions."""
        self._depth = depth = info.decoder.depth
        self._local = layer_indices(self.config.local_layers, depth, "local_layers")
        self._previous = layer_indices(self.config.previous_layers, depth, "previous_layers")
        self._translation = info.action.groups.get("translation", ())
        self._cuts = self.cuts(depth)
        self._layouts: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, layers that rank, layers that are remembered, and frames as far as the look-back goes."""
        needs = super().requirements(info).also_called_after([*self._local, *self._previous])
        return replace(needs, look_back_frames=signals.LONGEST_LOOK_BACK)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The instruction's rows, at the layers that rank in this mode and at those that are remembered."""
        ranked = {layer for layer in self._local if layer <= self._last(mode)}
        return tuple(Probe(layer, self.config.rows) for layer in sorted(ranked | set(self._previous)))

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int:
        """Far when the arm has moved little since the last query."""
        return signals.look_back(signals.travelled(ctx.since_query, self._translation))

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """What earlier frames and queries say."""
        return self._propose(ctx, self._history(ctx))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Add what this layer attends to; remember it where the next query is to know."""
        local = ctx.layer in self._local and ctx.layer <= self._last(ctx.mode)
        remembered = ctx.layer in self._previous
        attended = attention_to_patches(ctx, self.config.rows) if local or remembered else None
        proposal = None
        if ctx.layer <= self._last(ctx.mode):
            known = self._history(ctx) if ctx.layer == self._first else self._recall(ctx)
            if local and attended is not None:
                member = torch.ones_like(ctx.prunable, dtype=torch.bool)
                claim = claims(ctx, attended, member, self.config.local_top)
                known["local"] = torch.minimum(known["local"], claim)
            proposal = self._propose(ctx, known)
        if remembered and attended is not None:
            ctx.remember(f"previous.{ctx.layer}", attended)
        return proposal

    @property
    def _first(self) -> int:
        return min(self._local + self._cuts + self._previous)

    def _last(self, mode: str) -> int:
        """The last cut that drops anything in this mode; work after it would be for nothing."""
        return max(self.drops(self._depth, mode), default=-2)

    def _union(self, mode: str) -> bool:
        return any(self.config.budget(mode, number).amount == UNION for number in range(len(self._cuts)))

    def _history(self, ctx: SelectContext) -> dict[str, Tensor]:
        similar, found = frame_similarity(ctx)
        changed = (similar < per_view(ctx, self.config.unchanged)) & found[:, None]
        known = {"dynamic": claims(ctx, -similar, changed, self.config.changed_top)}
        known["previous"] = torch.full_like(similar, torch.inf)
        for layer in self._previous:
            attended, seen = ctx.recall(f"previous.{layer}")
            claim = claims(ctx, attended, seen, self.config.previous_top)
            known["previous"] = torch.minimum(known["previous"], claim)
        known["local"] = torch.full_like(similar, torch.inf)
        return known

    def _recall(self, ctx: SelectContext) -> dict[str, Tensor]:
        return {reason: ctx.recall(reason)[0] for reason in REASONS}

    def _propose(self, ctx: SelectContext, known: dict[str, Tensor]) -> Proposal:
        for reason, claim in known.items():
            ctx.remember(reason, claim)
        alpha = signals.in_mode(self.config.alpha, ctx.mode)
        best = torch.stack(list(known.values())).amin(0)
        claimed = torch.isfinite(best)
        protect = best <= alpha
        if self._union(ctx.mode):
            # A union of nothing would leave nothing: where no signal speaks, everything stays.
            protect = protect | ~claimed.any(1, keepdim=True)
        return Proposal(
            # What nothing speaks for comes last, evenly spread.
            score=torch.where(claimed, -best, self._spread(ctx) - 1e6),
            protect=protect,
            reasons={reason: claim <= alpha for reason, claim in known.items()},
        )

    def _spread(self, ctx: SelectContext) -> Tensor:
        key = (ctx.layout, ctx.prunable.device)
        if key not in self._layouts:
            self._layouts[key] = grid_scores(ctx.layout).to(ctx.prunable.device)
        return self._layouts[key][ctx.prunable]
