"""What a simulated environment implements so that policies can be evaluated in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tokenprune.engine.adapter import Observation

Frames = Callable[[], Mapping[str, np.ndarray]]
"""Renders the images `{view: uint8 [H, W, 3]}` of one moment; may be called later."""


@dataclass(frozen=True)
class Task:
    """One task of an environment.

    Attributes:
        index: Its position among the environment's tasks.
        name: What `--tasks` accepts besides the index.
        instruction: The language instruction.
        init_states: Number of initial states.
    """

    index: int
    name: str
    instruction: str
    init_states: int


@dataclass(frozen=True)
class Suite:
    """What an environment offers; known before any simulator is made.

    Attributes:
        name: Registered name of the environment.
        tasks: All of them, in order.
        views: Cameras of an observation.
        horizon: Control steps after which an episode has failed.
        control_hz: Control steps per second.
        settings: Everything that changes observations or dynamics, as plain data: settling steps, rendering, widened
            initial positions, versions. Episodes are comparable only where these are equal.
        seeded: Whether the seed changes where an episode begins.
    """

    name: str
    tasks: tuple[Task, ...]
    views: tuple[str, ...]
    horizon: int
    control_hz: float
    settings: Mapping[str, Any]
    seeded: bool


@dataclass(frozen=True)
class Step:
    """The result of executing one action.

    Attributes:
        success: Whether the task is done.
        pose: Achieved end-effector position (m) and quaternion (x, y, z, w), `[7]`; None where it is not known.
    """

    success: bool
    pose: np.ndarray | None


class Environment(Protocol):
    """A simulator of one suite; used by one process and one thread.

    It takes actions in the conventions of the policies that it was made for, and converts them itself.
    """

    suite: Suite

    def reset(self, task: int, init_state: int, seed: int) -> None:
        """Begin an episode and let the scene settle; equal arguments begin equal episodes, whatever ran before.

        Raises:
            SimulatorError: If there is no such task or initial state, or the simulator fails.
        """
        ...

    def observe(self) -> Observation:
        """Return the current observation: images and proprioceptive state."""
        ...

    def frames(self) -> Frames:
        """Return a function that renders the images of this moment."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Execute one action `[D]`."""
        ...

    def close(self) -> None:
        """Release the simulator."""
        ...


class EnvironmentFactory(Protocol):
    """The class that `EnvironmentSpec.target` names; describes and makes environments."""

    @staticmethod
    def describe(name: str, options: Mapping[str, Any]) -> Suite:
        """Describe the environment of this registered name; no simulator is made.

        Raises:
            SimulatorError: If a package or file that it needs is missing, saying how to install it.
            ConfigError: If an option is wrong.
        """
        ...

    @staticmethod
    def build(name: str, options: Mapping[str, Any]) -> Environment:
        """Make the environment of this registered name.

        Raises:
            SimulatorError: If a package or file is missing, or the simulator or its renderer does not start.
            ConfigError: If an option is wrong.
        """
        ...
