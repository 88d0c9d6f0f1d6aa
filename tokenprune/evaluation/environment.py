"""What a simulated environment implements, so that policies can be evaluated in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tokenprune.engine.adapter import Observation

Frames = Callable[[], Mapping[str, np.ndarray]]
"""Draws the images `{view: uint8 [H, W, 3]}` of one moment when it is called, however much later that is."""


@dataclass(frozen=True)
class Task:
    """One task of an environment.

    Attributes:
        index: Its place in the environment's order.
        name: What `--tasks` accepts besides the index.
        instruction: What the robot is told.
        init_states: How many initial states there are to start from.
    """

    index: int
    name: str
    instruction: str
    init_states: int


@dataclass(frozen=True)
class Suite:
    """What an environment offers, known before any simulator is made.

    Attributes:
        name: Registered name of the environment.
        tasks: All of them, in order.
        views: Cameras of an observation.
        horizon: Control steps after which an episode has failed.
        control_hz: Control steps per second.
        settings: Everything that changes what a policy sees or meets, as plain data: settling steps, rendering,
            widened initial positions, versions. Episodes are comparable only where these are equal.
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
    """What executing one action led to.

    Attributes:
        success: Whether the task is done.
        pose: Achieved end-effector position (m) and quaternion x y z w, `[7]`, or None where it is not known.
    """

    success: bool
    pose: np.ndarray | None


class Environment(Protocol):
    """A simulator of one suite; belongs to one process and one thread.

    Actions are those of the policies it was made for, in their conventions: the adapter converts them.
    """

    suite: Suite

    def reset(self, task: int, init_state: int, seed: int) -> None:
        """Begin an episode and let the scene settle; the same arguments begin the same episode, whatever came before.

        Raises:
            SimulatorError: If there is no such task or initial state, or the simulator fails.
        """
        ...

    def observe(self) -> Observation:
        """Draw and measure what the robot sees and feels now."""
        ...

    def frames(self) -> Frames:
        """The images of this moment, drawn only if they are asked for."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Execute one action `[D]`."""
        ...

    def close(self) -> None:
        """Free the simulator."""
        ...


class EnvironmentFactory(Protocol):
    """What an `EnvironmentSpec.target` names: makes environments."""

    @staticmethod
    def describe(name: str, options: Mapping[str, Any]) -> Suite:
        """What the environment of this registered name would be; no simulator is made.

        Raises:
            SimulatorError: If something is missing that it needs, saying how to install it.
            ConfigError: If an option is wrong.
        """
        ...

    @staticmethod
    def build(name: str, options: Mapping[str, Any]) -> Environment:
        """Make it.

        Raises:
            SimulatorError: As `describe`, or if the simulator or its renderer cannot be started.
            ConfigError: If an option is wrong.
        """
        ...
