"""SP-VLA's scheduler (arXiv 2506.12723): while the arm moves steadily, go on as it moved, without the model.

A query is answered by extrapolation when the last executed translation lies within [v_min, v_max] on every axis and
more than `share` of the last `window` executed actions came from the model; otherwise the model runs. The
extrapolation is ridge regression of each dimension on time over that window, in closed form. The paper extrapolates the
one action its policy gives; here it is a chunk, as many as the policy's own. The gripper repeats its last command, for
a straight line through open and closed means nothing. The paper's bounds were not found: those below, on magnitudes
and in the action's own numbers, are ours, and so are window, share and ridge.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from tokenprune import BackboneInfo, ControlContext, ControlDecision, Stage, StageConfig, hookimpl


class SchedulerConfig(StageConfig):
    """When a chunk is extrapolated, and from what."""

    v_min: float = Field(default=0.0, ge=0, description="Least magnitude of the last translation on each axis.")
    v_max: float = Field(default=0.8, gt=0, description="Greatest magnitude of the last translation on each axis.")
    window: int = Field(default=16, ge=2, description="Executed actions that are looked at.")
    share: float = Field(default=0.5, ge=0, lt=1, description="More than this share of them must be the model's.")
    ridge: float = Field(default=1.0, ge=0, description="Penalty on the slope, in squared control steps.")

    @model_validator(mode="after")
    def _in_order(self) -> SchedulerConfig:
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min {self.v_min} must lie below v_max {self.v_max}")
        return self


class Scheduler(Stage[SchedulerConfig]):
    """Answers queries itself while the arm moves steadily."""

    Config = SchedulerConfig

    def bind(self, info: BackboneInfo) -> None:
        """Find translation and gripper among the actions.

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
        """How much is extrapolated at once."""
        return f"answers with {info.action.horizon} extrapolated actions"

    @hookimpl
    def control(self, ctx: ControlContext) -> ControlDecision | None:
        """Extrapolate, or let the model run."""
        if ctx.event != "query":
            return None
        memory, config = ctx.memory, self.config
        done = len(ctx.executed)
        # What was executed since this stage was last asked is what it then answered, or the model did.
        made: list[bool] = memory.setdefault("made", [])
        made += [memory.get("model", True)] * (done - len(made))
        answers = done >= config.window and sum(made[-config.window :]) > config.share * config.window
        recent = np.stack([one.action for one in ctx.executed[-config.window :]]) if answers else np.empty(0)
        if answers:
            pace = np.abs(recent[-1, self._translation])
            answers = config.v_min <= float(np.min(pace)) and float(np.max(pace)) <= config.v_max
        memory["model"] = not answers
        if not answers:
            return None
        chunk = extrapolated(recent, self._horizon, config.ridge)
        if self._gripper is not None:
            chunk[:, self._gripper] = recent[-1, self._gripper]
        return ControlDecision(ctx.modes[0], actions=chunk)


def extrapolated(recent: np.ndarray, steps: int, ridge: float) -> np.ndarray:
    """The next actions `[steps, D]` on the line through `[n, D]` that ridge regression on time finds.

    The slope is penalised, the mean is not.
    """
    time = np.arange(len(recent)) - (len(recent) - 1) / 2
    slope = time @ (recent - recent.mean(0)) / (time @ time + ridge)
    line: np.ndarray = recent.mean(0) + np.outer(time[-1] + 1 + np.arange(steps), slope)
    return line
