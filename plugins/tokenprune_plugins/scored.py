"""The base of strategies that score tokens in the same way before layer 0 and after any layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from tokenprune.context import LayerContext, SelectContext
from tokenprune.hookspecs import hookimpl
from tokenprune.selection import Proposal
from tokenprune.stage import ConfigT, Stage


class Scored(Stage[ConfigT], ABC):
    """A stage whose score does not depend on where it is asked."""

    @abstractmethod
    def score(self, ctx: SelectContext) -> Tensor:
        """Scores `[B, P]` of the prunable tokens; higher stays."""

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Scores before layer 0."""
        return Proposal(score=self.score(ctx))

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal:
        """Scores after a layer."""
        return Proposal(score=self.score(ctx))
