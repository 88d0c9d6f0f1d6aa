"""SpecPrune's static stage (arXiv 2509.05614, section on static pruning): drop patches that no signal marks.

There are three signals: the patch changed since an earlier frame, it was attended to in the previous query, or the
instruction attends to it in the first layers. The paper keeps the union of the best patches of each signal. Here each
signal ranks the patches of a view, and the claim of a patch is its best rank in any signal, relative to the signal's
`top`. Patches with claims up to `alpha` are the paper's union. Under a fixed budget, patches with larger claims follow
in order. So the first query of an episode, which has no earlier frame and no previous query, spends the same budget by
the attention of the first layers alone.
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
from tokenprune_plugins.shared.bases import last_drop
from tokenprune_plugins.shared.grid import grid_scores
from tokenprune_plugins.shared.layout_table import LayoutTable
from tokenprune_plugins.shared.patch_change import frame_similarity
from tokenprune_plugins.shared.ranks import claims, per_view
from tokenprune_plugins.specprune import signals

Top = Annotated[int, Field(ge=1)]
REASONS = ("dynamic", "previous", "local")


class StaticConfig(CutConfig):
    """Constants of the static stage; the defaults are those of the paper's third version where it gives them."""

    after: Cuts = (0, 1)
    keep: Keep = "union"
    alpha: float | dict[str, float] = Field(
        default=0.8,
        description="Size of the union: the best alpha * top patches of each signal; may depend on the mode.",
    )
    local_layers: Layers = Field(default=(0, 1), description="Layers whose attention in this query ranks patches.")
    local_top: Top = Field(default=24, description="Top patches of each view and local layer.")
    previous_layers: Layers = Field(
        default=("44%", "97%"), description="Layers whose attention ranks patches in the next query."
    )
    previous_top: Top = Field(default=30, description="Top patches of each view and previous layer.")
    changed_top: Top = Field(default=20, description="Top changed patches of each view.")
    unchanged: tuple[float, ...] = Field(
        default=(0.986, 0.98),
        min_length=1,
        description="Cosine similarity of a patch's pixels from which it counts as unchanged, for each view in "
        "sequence order; the last value repeats.",
    )
    rows: Literal["instruction", "text", "last"] = Field(
        default="instruction", description="Query rows whose attention ranks patches."
    )

    def modes(self) -> dict[str, set[str]]:
        """Modes of the budgets and of `alpha`."""
        own = {"alpha": set(self.alpha)} if isinstance(self.alpha, dict) else {}
        return {**super().modes(), **own}


class Static(Stage[StaticConfig]):
    """Keeps patches that changed, that the previous query attended to, or that the first layers attend to."""

    Config = StaticConfig

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the layers in this decoder, and look up the dimensions of the translation."""
        self._depth = depth = info.decoder.depth
        self._local = layer_indices(self.config.local_layers, depth, "local_layers")
        self._previous = layer_indices(self.config.previous_layers, depth, "previous_layers")
        self._translation = info.action.groups.get("translation", ())
        self._cuts = self.cuts(depth)
        self._grid = LayoutTable(grid_scores)

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, the local and previous layers, and the frames that the look-back may reach."""
        needs = super().requirements(info).also_called_after([*self._local, *self._previous])
        return replace(needs, look_back_frames=signals.LONGEST_LOOK_BACK)

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """The rows at the local layers that a cut of this mode uses, and at the previous layers."""
        last = last_drop(self, self._depth, mode)
        local = {layer for layer in self._local if layer <= last}
        return tuple(Probe(layer, self.config.rows) for layer in sorted(local | set(self._previous)))

    @hookimpl
    def look_back(self, ctx: ControlContext) -> int:
        """Control steps to the frame to compare with; the less the arm moved since the last query, the more."""
        return signals.look_back(signals.travelled(ctx.since_query, self._translation))

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Propose by the signals of earlier frames and queries."""
        return self._propose(ctx, self._history(ctx))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Add the attention of a local layer and propose; remember that of a previous layer for the next query."""
        last = last_drop(self, self._depth, ctx.mode)
        local = ctx.layer in self._local and ctx.layer <= last
        remembered = ctx.layer in self._previous
        attended = attention_to_patches(ctx, self.config.rows) if local or remembered else None
        proposal = None
        if ctx.layer <= last:
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

    def _union(self, mode: str) -> bool:
        return any(self.config.budget(mode, number).amount == UNION for number in range(len(self._cuts)))

    def _history(self, ctx: SelectContext) -> dict[str, Tensor]:
        """Claims `[B, P]` by signal, from earlier frames and queries; no local claims yet."""
        similarity, found = frame_similarity(ctx)
        changed = (similarity < per_view(ctx, self.config.unchanged)) & found[:, None]
        known = {"dynamic": claims(ctx, -similarity, changed, self.config.changed_top)}
        known["previous"] = torch.full_like(similarity, torch.inf)
        for layer in self._previous:
            attended, held = ctx.recall(f"previous.{layer}")
            claim = claims(ctx, attended, held, self.config.previous_top)
            known["previous"] = torch.minimum(known["previous"], claim)
        known["local"] = torch.full_like(similarity, torch.inf)
        return known

    def _recall(self, ctx: SelectContext) -> dict[str, Tensor]:
        """Claims `[B, P]` by signal, as an earlier layer of this query left them."""
        return {reason: ctx.recall(reason)[0] for reason in REASONS}

    def _propose(self, ctx: SelectContext, known: dict[str, Tensor]) -> Proposal:
        for reason, claim in known.items():
            ctx.remember(reason, claim)
        alpha = signals.in_mode(self.config.alpha, ctx.mode)
        best = torch.stack(list(known.values())).amin(0)
        claimed = torch.isfinite(best)
        protect = best <= alpha
        if self._union(ctx.mode):
            # An empty union would drop everything; where no patch has a claim, all stay.
            protect = protect | ~claimed.any(1, keepdim=True)
        return Proposal(
            # Patches without a claim come last, evenly spread over the grid.
            score=torch.where(claimed, -best, self._grid.of(ctx)[ctx.prunable] - 1e6),
            protect=protect,
            reasons={reason: claim <= alpha for reason, claim in known.items()},
        )
