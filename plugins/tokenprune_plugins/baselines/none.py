"""A baseline that is called at every cut and drops nothing: it measures the cost of the framework itself."""

from __future__ import annotations

from tokenprune import CutConfig, Keep, LayerContext, Proposal, SelectContext, Stage, hookimpl


class NothingConfig(CutConfig):
    """A cut that keeps everything."""

    keep: Keep = 1.0


class Nothing(Stage[NothingConfig]):
    """Makes no proposal at any cut, so a query calls every hook and no token leaves."""

    Config = NothingConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Make no proposal."""
        return None

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Make no proposal."""
        return None
