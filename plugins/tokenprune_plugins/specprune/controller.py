"""SpecPrune's action-aware controller: coarse mode while the arm travels, fine mode while it works.

`fine` begins as soon as an executed action is slow. It ends only at a query, if the last executed action was fast by
larger bounds, so a chunk that begins in `fine` also ends in it.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from tokenprune import (
    BackboneInfo,
    ControlContext,
    ControlDecision,
    ExecutedAction,
    Stage,
    StageConfig,
    Strict,
    hookimpl,
)
from tokenprune_plugins.shared.action_dims import three_dims


class Motion(Strict):
    """Bounds on the motion of one executed action; a bound that is left out does not apply."""

    translation: float | None = Field(default=None, description="Length of the translation.")
    planar: float | None = Field(default=None, description="Length of the horizontal part of the translation.")
    rise: float | None = Field(default=None, description="Vertical part of the translation, positive upwards.")
    rotation: float | None = Field(default=None, description="Length of the rotation.")

    @model_validator(mode="after")
    def _not_empty(self) -> Motion:
        if not self.bounds:
            raise ValueError("give at least one of translation, planar, rise, rotation")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that apply, by name."""
        return {name: bound for name, bound in self if bound is not None}


class ControllerConfig(StageConfig):
    """The two modes, and the bounds on motion between them."""

    coarse: str = Field(default="coarse", description="Mode while the arm travels.")
    fine: str = Field(default="fine", description="Mode while the arm works.")
    enter: tuple[Motion, ...] = Field(
        min_length=1,
        description="`fine` begins when an executed action is below every bound of at least one entry of this list.",
    )
    leave: Motion = Field(
        description="`fine` ends at a query if the last executed action is above at least one of these bounds."
    )
    units: Literal["action", "metric"] = Field(
        default="action",
        description="Units of the bounds: action: those of the executed action; metric: metres and radians per control "
        "step.",
    )
    first_step: int = Field(default=0, ge=0, description="Number of actions ignored at the start of an episode.")
    replan: bool = Field(default=False, description="Ask the host for a new query when `fine` begins within a chunk.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.coarse, self.fine}


class Controller(Stage[ControllerConfig]):
    """Chooses the coarse or the fine mode by the motion of the last executed action."""

    Config = ControllerConfig

    def bind(self, info: BackboneInfo) -> None:
        """Look up the dimensions of translation and rotation, and their units.

        Raises:
            ValueError: If the actions have no translation and rotation of three numbers each, or if bounds are metric
                and the backbone does not define its actions in metres and radians.
        """
        action = info.action
        self._horizon = action.horizon
        self._dims = {group: three_dims(info, group) for group in ("translation", "rotation")}
        self._scale = dict.fromkeys(self._dims, 1.0)
        if self.config.units == "metric":
            for group in self._dims:
                if group not in action.metric:
                    raise ValueError(
                        f"units: metric, but '{info.name}' does not define its {group} in metres or radians; "
                        "use units: action"
                    )
                self._scale[group] = action.metric[group]

    def caveats(self, info: BackboneInfo) -> str:
        """Units of the bounds."""
        return "bounds in " + ("metres and radians" if self.config.units == "metric" else "the action's own units")

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Enter `fine` after a slow action; leave it at a query that follows a fast one."""
        memory, steps = ctx.memory, len(ctx.executed)
        fine = memory.get("fine", False)
        replan = False
        if ctx.event == "executed" and not fine and steps > self.config.first_step:
            motion = self._motion(ctx.executed[-1])
            if any(all(motion[name] < bound for name, bound in m.bounds.items()) for m in self.config.enter):
                memory["fine"], memory["entered"] = True, steps
                replan = self.config.replan and ctx.queries > 0 and len(ctx.since_query) < self._horizon
        elif ctx.event == "query" and fine and memory["entered"] != steps:
            motion = self._motion(ctx.executed[-1])
            memory["fine"] = not any(motion[name] > bound for name, bound in self.config.leave.bounds.items())
        mode = self.config.fine if memory.get("fine", False) else self.config.coarse
        return ControlDecision(mode, replan)

    def _motion(self, executed: ExecutedAction) -> dict[str, float]:
        x, y, z = (float(executed.action[dim]) * self._scale["translation"] for dim in self._dims["translation"])
        turn = math.hypot(*(float(executed.action[dim]) for dim in self._dims["rotation"])) * self._scale["rotation"]
        return {"translation": math.hypot(x, y, z), "planar": math.hypot(x, y), "rise": z, "rotation": turn}
