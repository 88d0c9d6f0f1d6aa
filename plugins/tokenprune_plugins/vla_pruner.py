"""VLA-Pruner (arXiv 2511.16449): patches that the prefix or the last actions attend to, thinned out by diversity.

Two scores, each taking its best `keep` patches: the attention a patch gets from every token at the layer before the
cut, mean over heads and queries; and what the action tokens of the last `window` queries paid it, the newest weighted
most (`decay`). Of the union a DivPrune of the input embeddings keeps `keep`. Until the window is full nothing is
pruned: the stage chooses the mode itself. `action_layers` are the second half of the decoder in the paper, layer 15 of
32 in the released code, which also weights the oldest query most (`newest_first: false`). A patch that a query had
pruned counts 0 there, as in the released code; only the other score can bring it back.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from torch import Tensor

from tokenprune import (
    BackboneInfo,
    ControlContext,
    ControlDecision,
    CutConfig,
    Cuts,
    ExecutedAction,
    Keep,
    LayerContext,
    Layers,
    Plan,
    Probe,
    Proposal,
    QueryRecord,
    SelectContext,
    Stage,
    StageNeeds,
    TokenLayout,
    hookimpl,
    layer_indices,
    rows_at,
)
from tokenprune_plugins.divprune import farthest_first
from tokenprune_plugins.shared.ranks import rank_within
from tokenprune_plugins.shared.similarity import likeness_flops

SECOND_HALF = tuple(f"{100 * layer / 32:.0f}%" for layer in range(16, 32))


class VLAPrunerConfig(CutConfig):
    """Where VLA-Pruner cuts and how far it looks back; the paper's K = 3 is `after: 2`, and that is 6 % of 32."""

    after: Cuts = ("6%",)
    keep: Keep = Field(default={"full": 1.0, "pruned": 0.5})
    action_layers: Layers = Field(default=SECOND_HALF, description="Layers whose action tokens are watched.")
    window: int = Field(default=3, ge=1, description="Queries whose actions count; before that many nothing is pruned.")
    decay: float = Field(default=0.8, gt=0, le=1, description="Weight of each query over the one after it.")
    newest_first: bool = Field(default=True, description="Whether the newest query counts most.")
    full: str = Field(default="full", description="Mode until the window is full.")
    pruned: str = Field(default="pruned", description="Mode from then on.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.full, self.pruned}


class VLAPruner(Stage[VLAPrunerConfig]):
    """Keeps different-looking patches among those that prefix and actions attend to."""

    Config = VLAPrunerConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, a look at the embeddings, and the action tokens' attention at the action layers."""
        needs = super().requirements(info).also_called_after([-1])
        return replace(needs, action_attention=self._action_layers(info.decoder.depth))

    def _action_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices(self.config.action_layers, depth, "action_layers")

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """Every row at the layers of cuts that drop anything, and the watched rows where they are in the layout."""
        depth = info.decoder.depth
        own = tuple(Probe(layer, "all") for layer in self.drops(depth, mode))
        watched = self._action_layers(depth) if "action" in layout.row_names else ()
        return own + tuple(Probe(layer, "action") for layer in watched)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """Cosines of all pairs, where anything leaves."""
        cuts = [cut for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return sum(likeness_flops(cut.found, info.decoder.hidden) for cut in cuts)

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Prune once the window is full."""
        return ControlDecision(self.config.full if ctx.queries < self.config.window else self.config.pruned)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Note the embeddings."""
        ctx.scratch["embeddings"] = ctx.patches

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Diversity within the union of what either score keeps."""
        cut = ctx.plan.cut_after[ctx.layer]
        if cut.keep == cut.found:
            return None
        member = rank_within(ctx.received_attention()) < cut.keep
        member = member | (rank_within(self._acted_on(ctx)) < cut.keep)
        # Embeddings were noted for every prunable token; earlier cuts may have taken some.
        embeddings = rows_at(ctx.scratch["embeddings"], ctx.places)
        return Proposal(score=farthest_first(embeddings, cut.keep, member))

    @hookimpl
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        """Keep what this query's actions attended to, mean over layers, heads and tokens."""
        if isinstance(record, ExecutedAction):
            return
        for layer, seen in record.attention.items():
            if layer in self._watched:
                record.push(f"acted.{layer}", seen.prunable, seen.weights.mean((1, 2)), self.config.window)

    def bind(self, info: BackboneInfo) -> None:
        """Find the watched layers in this decoder."""
        self._watched = self._action_layers(info.decoder.depth)

    def _acted_on(self, ctx: LayerContext) -> Tensor:
        ages = range(self.config.window)
        weights = [self.config.decay**age for age in (ages if self.config.newest_first else reversed(ages))]
        score = ctx.prunable.double() * 0
        for layer in self._watched:
            for age, weight in zip(ages, weights, strict=True):
                score = score + weight * ctx.recall(f"acted.{layer}.{age}")[0]
        return score
