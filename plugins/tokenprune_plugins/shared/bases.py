"""Base classes of stages that follow one rule before layer 0 and after any layer, and what their cuts share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenprune import ConfigT, CutConfig, Keep, LayerContext, Proposal, SelectContext, Stage, hookimpl


class AnyLayerStage(Stage[ConfigT], ABC):
    """A stage that proposes by the same rule before layer 0 and after every layer."""

    @abstractmethod
    def propose(self, ctx: SelectContext) -> Proposal:
        """The stage's proposal for the prunable tokens held now."""

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Propose before layer 0."""
        return self.propose(ctx)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Propose after a layer."""
        return self.propose(ctx)


class ScoreStage(AnyLayerStage[ConfigT], ABC):
    """A stage that proposes a score and nothing else, by the same rule at every layer."""

    @abstractmethod
    def score(self, ctx: SelectContext) -> Tensor:
        """Scores `[B, P]` of the prunable tokens held now; higher stays."""

    def propose(self, ctx: SelectContext) -> Proposal:
        """The score alone."""
        return Proposal(score=self.score(ctx))


class HalfConfig(CutConfig):
    """A cut that keeps half of the tokens by default."""

    keep: Keep = 0.5


def last_drop(stage: Stage[ConfigT], depth: int, mode: str) -> int:
    """Layer of the last cut that drops anything in a mode, -2 if none does; scores after it would be unused."""
    return max(stage.drops(depth, mode), default=-2)
