"""One camera and not the others, a control: what a strategy of the same budget has to be better than.

The named views stay whole. Of all others together `keep` patches stay, none by default, spread evenly. A policy that
has no view besides the named ones is refused, for nothing could leave.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from tokenprune import BackboneInfo, CutConfig, Keep, LayoutError, SelectContext, ViewBudget, nearest
from tokenprune_plugins.baselines.uniform_grid import UniformGrid
from tokenprune_plugins.shared.bases import HalfConfig, Scored


class ViewConfig(CutConfig):
    """Which views stay whole, and how much stays of the others."""

    keep: Keep = 0
    view: str | tuple[str, ...] = Field(default="primary", description="The view that stays whole, or several.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        own = {name: ViewBudget(keep=1.0) for name in self.named}
        # The models are frozen, for everyone else.
        object.__setattr__(self, "views", {**own, **self.views})
        return self

    @property
    def named(self) -> tuple[str, ...]:
        """The views that stay whole."""
        return (self.view,) if isinstance(self.view, str) else self.view


class KeepView(Scored[ViewConfig]):
    """Keeps the whole of named views and nothing of the others."""

    Config = ViewConfig

    def __init__(self, config: ViewConfig) -> None:
        """The others are ranked as an even grid ranks them."""
        super().__init__(config)
        self._grid = UniformGrid(HalfConfig(use="uniform_grid"))

    def bind(self, info: BackboneInfo) -> None:
        """Look for the views.

        Raises:
            LayoutError: If the policy lacks one of them, or has no other.
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
        """An even grid; the named views are kept by their budgets."""
        return self._grid.score(ctx)
