"""SP-VLA's scheduler (arXiv 2506.12723): while the arm moves steadily, extrapolate its actions without the model.

A query is answered by extrapolation if the magnitude of the last executed translation lies in [v_min, v_max] on every
axis and more than `share` of the last `window` executed actions came from the model; otherwise the model runs. The
extrapolation is a ridge regression of each dimension on time over that window, in closed form. The paper extrapolates
one action, as its policy predicts one; here it is a chunk of the policy's horizon. The gripper repeats its last
command, because a straight line through open and closed has no meaning. The paper's bounds were not found: `v_min` and
`v_max`, in the action's own units, are our choices, and so are `window`, `share` and `ridge`.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from tokenprune import BackboneInfo, ControlContext, ControlDecision, Stage, StageConfig, hookimpl


class SchedulerConfig(StageConfig):
    """When a chunk is extrapolated, and from which actions."""

    v_min: float = Field(default=0.0, ge=0, description="Least magnitude of the last translation on every axis.")
    v_max: float = Field(default=0.8, gt=0, description="Greatest magnitude of the last translation on every axis.")
    window: int = Field(default=16, ge=2, description="Number of last executed actions that the regression uses.")
    share: float = Field(
        default=0.5, ge=0, lt=1, description="More than this share of the window must have come from the model."
    )
    ridge: float = Field(default=1.0, ge=0, description="Ridge penalty on the slope, in squared control steps.")

    @model_validator(mode="after")
    def _in_order(self) -> SchedulerConfig:
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min {self.v_min} must lie below v_max {self.v_max}")
        return self


class Scheduler(Stage[SchedulerConfig]):
    """Answers queries with extrapolated actions while the arm moves steadily."""

    Config = SchedulerConfig

    def bind(self, info: BackboneInfo) -> None:
        """Look up the dimensions of translation and gripper, and the horizon.

        Raises:
            ValueError: If the actions have no translation.
        """
        action = info.action
        if "translation" not in action.groups:
            raise ValueError(f"it needs actions with a translation; '{info.name}' moves {', '.join(action.groups)}")
        self._translation = list(action.groups["translation"])
        self._gripper = None if action.gripper is None else action.gripper[0]
        self._horizon = action.horizon

    def caveats(self, info: BackboneInfo) -> str:
        """How many actions are extrapolated at once."""
        return f"answers with {info.action.horizon} extrapolated actions"

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        """Answer with an extrapolated chunk, or return None to let the model run."""
        if ctx.event != "query":
            return None
        memory, config = ctx.memory, self.config
        done = len(ctx.executed)
        # All actions executed since the last query come from that query's answer: the model's or an extrapolation.
        from_model: list[bool] = memory.setdefault("from_model", [])
        from_model += [memory.get("model", True)] * (done - len(from_model))
        answers = done >= config.window and sum(from_model[-config.window :]) > config.share * config.window
        recent = np.stack([one.action for one in ctx.executed[-config.window :]]) if answers else np.empty(0)
        if answers:
            speed = np.abs(recent[-1, self._translation])
            answers = config.v_min <= float(np.min(speed)) and float(np.max(speed)) <= config.v_max
        memory["model"] = not answers
        if not answers:
            return None
        chunk = extrapolate(recent, self._horizon, config.ridge)
        if self._gripper is not None:
            chunk[:, self._gripper] = recent[-1, self._gripper]
        return ControlDecision(ctx.modes[0], actions=chunk)


def extrapolate(recent: np.ndarray, steps: int, ridge: float) -> np.ndarray:
    """The next actions `[steps, D]` by ridge regression of the recent ones `[n, D]` on time.

    The slope is penalised, the mean is not.
    """
    time = np.arange(len(recent)) - (len(recent) - 1) / 2
    slope = time @ (recent - recent.mean(0)) / (time @ time + ridge)
    line: np.ndarray = recent.mean(0) + np.outer(time[-1] + 1 + np.arange(steps), slope)
    return line
