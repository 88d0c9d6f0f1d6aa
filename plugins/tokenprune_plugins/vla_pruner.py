"""VLA-Pruner (arXiv 2511.16449): keep diverse patches among those that the prefix or recent actions attend to.

Two scores each choose their best `keep` patches: the attention that a patch gets from every token at the layer before
the cut, mean over heads and query rows; and the attention it got from the action tokens of the last `window` queries,
weighted by `decay`, the newest query most. From the union of both, DivPrune on the input embeddings keeps `keep`
patches. Until the window is full nothing is pruned: the stage chooses the mode itself. `action_layers` are the second
half of the decoder in the paper and layer 15 of 32 in the released code, which also weights the oldest query most
(`newest_first: false`). As in the released code, a patch that was pruned in a query has action attention 0 in it, so
only the other score can bring it back.
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
from tokenprune_plugins.shared.similarity import similarity_flops

SECOND_HALF = tuple(f"{100 * layer / 32:.0f}%" for layer in range(16, 32))


class VLAPrunerConfig(CutConfig):
    """Where VLA-Pruner cuts and how many queries it looks back; the paper's K = 3 is `after: 2`, 6 % of 32 layers."""

    after: Cuts = ("6%",)
    keep: Keep = Field(default={"full": 1.0, "pruned": 0.5})
    action_layers: Layers = Field(default=SECOND_HALF, description="Layers whose action tokens' attention counts.")
    window: int = Field(
        default=3, ge=1, description="Queries whose action attention counts; before that many nothing is pruned."
    )
    decay: float = Field(
        default=0.8, gt=0, le=1, description="Factor between the weights of one query and the next one in the window."
    )
    newest_first: bool = Field(default=True, description="Whether the newest query has the largest weight.")
    full: str = Field(default="full", description="Mode until the window is full.")
    pruned: str = Field(default="pruned", description="Mode from then on.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.full, self.pruned}


class VLAPruner(Stage[VLAPrunerConfig]):
    """Keeps diverse patches among those that the prefix or recent actions attend to."""

    Config = VLAPrunerConfig

    def requirements(self, info: BackboneInfo) -> StageNeeds:
        """The cuts, a call before layer 0 for the embeddings, and the action tokens' attention at the action layers."""
        needs = super().requirements(info).also_called_after([-1])
        return replace(needs, action_attention=self._action_layers(info.decoder.depth))

    def _action_layers(self, depth: int) -> tuple[int, ...]:
        return layer_indices(self.config.action_layers, depth, "action_layers")

    def probes(self, info: BackboneInfo, layout: TokenLayout, mode: str) -> tuple[Probe, ...]:
        """All rows at the cuts that drop anything, and the action rows where the layout has them."""
        depth = info.decoder.depth
        own = tuple(Probe(layer, "all") for layer in self.drops(depth, mode))
        action_layers = self._action_layers(depth) if "action" in layout.row_names else ()
        return own + tuple(Probe(layer, "action") for layer in action_layers)

    def own_flops(self, info: BackboneInfo, plan: Plan) -> int:
        """FLOPs of the cosine similarities of all pairs, at cuts where any token leaves."""
        cuts = [cut for cut in self.own_cuts(plan) if cut.keep < cut.found]
        return sum(similarity_flops(cut.found, info.decoder.hidden) for cut in cuts)

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Choose the pruned mode once the window is full."""
        return ControlDecision(self.config.full if ctx.queries < self.config.window else self.config.pruned)

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> None:
        """Keep the input embeddings for the cuts."""
        ctx.scratch["embeddings"] = ctx.patches

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Score by diversity within the union of the best patches of both scores."""
        cut = ctx.plan.cut_after[ctx.layer]
        if cut.keep == cut.found:
            return None
        member = rank_within(ctx.received_attention()) < cut.keep
        member = member | (rank_within(self._action_score(ctx)) < cut.keep)
        # The embeddings are those of all prunable tokens; earlier cuts may have dropped some.
        embeddings = rows_at(ctx.scratch["embeddings"], ctx.places)
        return Proposal(score=farthest_first(embeddings, cut.keep, member))

    @hookimpl
    def observe(self, record: QueryRecord | ExecutedAction) -> None:
        """Remember the action tokens' attention of this query by layer, mean over heads and action tokens."""
        if isinstance(record, ExecutedAction):
            return
        for layer, attention in record.attention.items():
            if layer in self._watched:
                record.push(f"acted.{layer}", attention.prunable, attention.weights.mean((1, 2)), self.config.window)

    def bind(self, info: BackboneInfo) -> None:
        """Resolve the action layers in this decoder."""
        self._watched = self._action_layers(info.decoder.depth)

    def _action_score(self, ctx: LayerContext) -> Tensor:
        """Weighted sum over the window of the action tokens' attention `[B, P]`."""
        ages = range(self.config.window)
        weights = [self.config.decay**age for age in (ages if self.config.newest_first else reversed(ages))]
        score = ctx.prunable.double() * 0
        for layer in self._watched:
            for age, weight in zip(ages, weights, strict=True):
                score = score + weight * ctx.recall(f"acted.{layer}.{age}")[0]
        return score
