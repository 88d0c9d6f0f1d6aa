"""One LIBERO task in MuJoCo: stepped through robosuite, drawn only when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import mujoco
import numpy as np
import numpy.typing as npt
from libero.libero.envs import TASK_MAPPING, bddl_utils
from robosuite import load_controller_config
from robosuite.utils.errors import RandomizationError

from tokenprune.errors import SimulatorError
from tokenprune_adapters.environments.libero.conventions import CONTROL_HZ, VIEWS, Vector

_PLACEMENT_TRIES = 100


class Simulator:
    """The scene of one task file.

    Drawing uses a copy of the simulator's state, so looking, now or later, changes nothing of what happens.
    """

    def __init__(self, task_file: Path, size: int, quality: Literal["full", "fast"]) -> None:
        """Compile the scene; takes seconds, and about 300 MB.

        Args:
            task_file: LIBERO's definition of the task.
            size: Side of the pictures in pixels.
            quality: How pictures are drawn.
        """
        problem = bddl_utils.get_problem_info(str(task_file))
        self.env: Any = TASK_MAPPING[problem["problem_name"]](
            str(task_file),
            robots=["Panda"],
            controller_configs=load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=CONTROL_HZ,
            ignore_done=True,
            hard_reset=False,
        )
        self.model: mujoco.MjModel = self.env.sim.model._model
        self.data: mujoco.MjData = self.env.sim.data._data
        self._drawn = mujoco.MjData(self.model)
        self._fast = quality == "fast"
        if self._fast:
            self.model.vis.quality.offsamples = 0
        self.renderer = mujoco.Renderer(self.model, size, size)
        # The collision meshes are group 0.
        self._visible = mujoco.MjvOption()
        self._visible.geomgroup[0] = 0
        self._measured: Mapping[str, Any] = {}
        movable = self.env.objects_dict.values()
        self._bodies: dict[str, str] = {item.name: item.root_body for item in movable}
        self._joints: dict[str, str] = {item.name: item.joints[-1] for item in movable}

    def begin(self, state: Vector, seed: int) -> None:
        """Put the scene into a flattened initial state; what LIBERO draws at random comes from `seed`."""
        # LIBERO draws from numpy's global generator.
        np.random.seed(seed)
        for _ in range(_PLACEMENT_TRIES):
            try:
                self.env.reset()
                break
            except RandomizationError:
                continue
        else:
            raise SimulatorError(f"LIBERO found no place for its objects in {_PLACEMENT_TRIES} tries")
        # Lives on the gripper's model, which a reset does not touch.
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self.env.sim.set_state_from_flattened(state)
        self.refresh()

    def refresh(self) -> None:
        """Let everything derived from positions and velocities follow a change of them."""
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()
        self.env._update_observables(force=True)
        self._measured = self.env._get_observations()

    def step(self, command: Vector) -> bool:
        """Execute one command `[7]` in the simulator's own convention; returns whether the task is done."""
        self._measured, _, done, _ = self.env.step(command)
        return bool(done)

    def objects(self) -> dict[str, Vector]:
        """Positions `[3]` (m) of the objects that are not fixed, by name."""
        return {name: np.array(self.data.body(body).xpos) for name, body in self._bodies.items()}

    def place_of(self, name: str) -> Vector:
        """Position `[3]` (m) of an object, or of a site that a task is about."""
        found = self.data.body(self._bodies[name]) if name in self._bodies else self.data.site(name)
        return np.array(found.xpos)

    def place(self, name: str, position: Vector) -> None:
        """Move an object without turning it; `refresh` lets the scene follow."""
        self.data.joint(self._joints[name]).qpos[:3] = position

    def save(self) -> Vector:
        """The flattened state, for `restore`."""
        return np.array(self.env.sim.get_state().flatten())

    def restore(self, state: Vector) -> None:
        """Go back to a saved state."""
        self.env.sim.set_state_from_flattened(state)
        self.refresh()

    @property
    def position(self) -> Vector:
        """End-effector position `[3]`, m."""
        return np.array(self._measured["robot0_eef_pos"], dtype=np.float64)

    @property
    def quaternion(self) -> Vector:
        """End-effector orientation `[4]`, x y z w."""
        return np.array(self._measured["robot0_eef_quat"], dtype=np.float64)

    @property
    def gripper(self) -> Vector:
        """Positions of the two gripper joints `[2]`, m."""
        return np.array(self._measured["robot0_gripper_qpos"], dtype=np.float64)

    @property
    def configuration(self) -> Vector:
        """Everything `draw` needs to draw this moment later, `[nq]`."""
        return np.array(self.data.qpos, dtype=np.float64)

    def draw(self, configuration: Vector, views: Mapping[str, str] = VIEWS) -> dict[str, npt.NDArray[np.uint8]]:
        """Upright pictures `[S, S, 3]` of a configuration, by view; each view is a camera of the scene."""
        pictures = {}
        for view in self._looks(configuration, views):
            if self._fast:
                self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            pictures[view] = self.renderer.render()
        return pictures

    def draw_geometry(self, configuration: Vector) -> dict[str, npt.NDArray[np.int32]]:
        """Index of the geometry that each pixel shows `[S, S]`, -1 for none, upright, by view."""
        shown = {}
        self.renderer.enable_segmentation_rendering()
        for view in self._looks(configuration, VIEWS):
            index, kind = np.moveaxis(self.renderer.render(), -1, 0)
            shown[view] = np.where(kind == mujoco.mjtObj.mjOBJ_GEOM, index, -1)
        self.renderer.disable_segmentation_rendering()
        return shown

    def _looks(self, configuration: Vector, views: Mapping[str, str]) -> Iterator[str]:
        """The views, the renderer looking from each at a configuration."""
        self._drawn.qpos[:] = configuration
        mujoco.mj_forward(self.model, self._drawn)
        for view, camera in views.items():
            self.renderer.update_scene(self._drawn, camera, self._visible)
            yield view

    def close(self) -> None:
        """Free the scene and the renderer."""
        self.renderer.close()
        self.env.close()
