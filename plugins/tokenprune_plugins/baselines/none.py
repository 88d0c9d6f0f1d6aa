"""A control that is asked at every cut and drops nothing: what the framework itself costs."""

from __future__ import annotations

from tokenprune import CutConfig, Keep, LayerContext, Proposal, SelectContext, Stage, hookimpl


class NothingConfig(CutConfig):
    """A cut that keeps everything."""

    keep: Keep = 1.0


class Nothing(Stage[NothingConfig]):
    """Abstains wherever it is asked, so a query runs through every call and no token leaves."""

    Config = NothingConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Abstain."""
        return None

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Abstain."""
        return None
