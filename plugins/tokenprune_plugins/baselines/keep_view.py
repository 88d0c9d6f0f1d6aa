"""A baseline that keeps one camera and drops the others: a strategy of the same budget should do better.

All patches of the named views stay. Of all other views together `keep` patches stay, none by default, spread evenly. A
policy without other views is refused, because no token could leave.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, LayoutError, SelectContext, ViewBudget, nearest
from tokenprune_plugins.baselines.uniform_grid import UniformGrid
from tokenprune_plugins.shared.bases import HalfConfig, ScoreStage


class ViewConfig(CutConfig):
    """Which views keep all their patches, and how many patches stay of the others."""

    keep: Keep = 0
    view: str | tuple[str, ...] = Field(
        default="primary", description="The view that keeps all its patches, or a list of views."
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        own = {name: ViewBudget(keep=1.0) for name in self.named}
        # The model is frozen, and a validator is the one place that may still complete it.
        object.__setattr__(self, "views", {**own, **self.views})
        return self

    @property
    def named(self) -> tuple[str, ...]:
        """The views that keep all their patches."""
        return (self.view,) if isinstance(self.view, str) else self.view


class KeepView(ScoreStage[ViewConfig]):
    """Keeps all patches of the named views, and of the others none or an even sample."""

    Config = ViewConfig

    def __init__(self, config: ViewConfig) -> None:
        super().__init__(config)
        self._grid = UniformGrid(HalfConfig(use="uniform_grid"))

    def bind(self, info: BackboneInfo) -> None:
        """Check that the backbone has the named views and others.

        Raises:
            LayoutError: If the backbone lacks a named view, or has no other view.
        """
        names = self.config.named
        for name in names:
            if name not in info.views:
                known = nearest(name, info.views)
                raise LayoutError(f"'keep_view': view: backbone '{info.name}' has no view '{name}'{known}")
        if not set(info.views) - set(names):
            raise LayoutError(
                f"'keep_view': backbone '{info.name}' has no view besides {', '.join(names)}, so nothing could leave; "
                "it needs a policy with several views"
            )

    def score(self, ctx: SelectContext) -> Tensor:
        """Score all patches by an even grid; the budgets of the named views keep these views whole."""
        return self._grid.score(ctx)
