"""SpecPrune's action-aware controller: coarse while the arm travels, fine while it works.

It enters `fine` as soon as an executed action is slow, and leaves it only at a query, when the last action was fast
again by larger bounds: a chunk that was begun in `fine` is finished in it.
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


class Motion(Strict):
    """Bounds on one executed action; those left out do not matter."""

    translation: float | None = Field(default=None, description="Length of the translation.")
    planar: float | None = Field(default=None, description="Length of its horizontal part.")
    rise: float | None = Field(default=None, description="Its vertical part, signed, upwards.")
    rotation: float | None = Field(default=None, description="Length of the rotation.")

    @model_validator(mode="after")
    def _says_something(self) -> Motion:
        if not self.bounds:
            raise ValueError("give at least one of translation, planar, rise, rotation")
        return self

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given."""
        return {name: bound for name, bound in self if bound is not None}


class ControllerConfig(StageConfig):
    """When the arm counts as working."""

    coarse: str = Field(default="coarse", description="Mode while the arm travels.")
    fine: str = Field(default="fine", description="Mode while it works.")
    enter: tuple[Motion, ...] = Field(
        min_length=1, description="`fine` begins when an action is below every bound of any of these."
    )
    leave: Motion = Field(description="`fine` may end when the last action is above any of these bounds.")
    units: Literal["action", "metric"] = Field(
        default="action",
        description="Bounds are in the executed action's own numbers, or in metres and radians per control step.",
    )
    first_step: int = Field(default=0, ge=0, description="Executed actions before this one are not looked at.")
    replan: bool = Field(default=False, description="Ask the host for a new query when `fine` begins within a chunk.")

    def chooses(self) -> set[str]:
        """Both modes."""
        return {self.coarse, self.fine}


class Controller(Stage[ControllerConfig]):
    """Chooses between a coarse and a fine mode by how the robot moves."""

    Config = ControllerConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find translation and rotation among the actions, and their units.

        Raises:
            ValueError: If the actions have no translation and rotation of three numbers each, or metric bounds are
                asked for and the backbone does not say what its actions are in metres and radians.
        """
        action = info.action
        self._horizon = action.horizon
        self._scale = {"translation": 1.0, "rotation": 1.0}
        for group in self._scale:
            if len(action.groups.get(group, ())) != 3:
                raise ValueError(
                    f"it needs actions with a {group} of three numbers; "
                    f"'{info.name}' moves {', '.join(f'{n} {list(d)}' for n, d in action.groups.items())}"
                )
            if self.config.units == "metric":
                if group not in action.metric:
                    raise ValueError(
                        f"units: metric, but '{info.name}' does not say what its {group} is in metres or radians; "
                        "use units: action"
                    )
                self._scale[group] = action.metric[group]
        self._groups = action.groups

    def caveats(self, info: BackboneInfo) -> str:
        """What the bounds are measured in."""
        return "bounds in " + ("metres and radians" if self.config.units == "metric" else "the action's own units")

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision:
        """Enter `fine` after a slow action; leave it at a query that follows a fast one."""
        memory, steps = ctx.memory, len(ctx.executed)
        looked_at = steps > self.config.first_step
        fine = memory.get("fine", False)
        replan = False
        if ctx.event == "executed" and not fine and looked_at:
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
        x, y, z = (float(executed.action[dim]) * self._scale["translation"] for dim in self._groups["translation"])
        turn = math.hypot(*(float(executed.action[dim]) for dim in self._groups["rotation"])) * self._scale["rotation"]
        return {"translation": math.hypot(x, y, z), "planar": math.hypot(x, y), "rise": z, "rotation": turn}
