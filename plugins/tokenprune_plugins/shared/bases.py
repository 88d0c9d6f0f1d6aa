"""Bases of strategies that do the same before layer 0 and after any layer, and their configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenprune import ConfigT, CutConfig, Keep, LayerContext, Proposal, SelectContext, Stage, hookimpl


class Anywhere(Stage[ConfigT], ABC):
    """A stage whose proposal does not depend on where it is asked."""

    @abstractmethod
    def propose(self, ctx: SelectContext) -> Proposal:
        """What it wishes for the prunable tokens held now."""

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Proposes before layer 0."""
        return self.propose(ctx)

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Proposes after a layer."""
        return self.propose(ctx)


class Scored(Anywhere[ConfigT], ABC):
    """A stage whose proposal is a score, the same wherever it is asked."""

    @abstractmethod
    def score(self, ctx: SelectContext) -> Tensor:
        """Scores `[B, P]` of the prunable tokens; higher stays."""

    def propose(self, ctx: SelectContext) -> Proposal:
        """The score alone."""
        return Proposal(score=self.score(ctx))


class HalfConfig(CutConfig):
    """A cut that keeps half unless told otherwise."""

    keep: Keep = 0.5
