"""One LIBERO task in MuJoCo: stepped by robosuite, rendered on demand."""

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

    Rendering uses a copy of the simulator's state, so it never changes the episode.
    """

    def __init__(self, task_file: Path, size: int, quality: Literal["full", "fast"]) -> None:
        """Compile the scene; takes seconds, and about 300 MB.

        Args:
            task_file: LIBERO's definition of the task.
            size: Side of the images in pixels.
            quality: See `LiberoOptions`.
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
        """Reset the scene to a flattened initial state; `seed` is for what LIBERO draws at random."""
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
        # Part of the gripper's model, which a reset does not change.
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self.env.sim.set_state_from_flattened(state)
        self.refresh()

    def refresh(self) -> None:
        """Recompute everything that depends on positions and velocities."""
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()
        self.env._update_observables(force=True)
        self._measured = self.env._get_observations()

    def step(self, command: Vector) -> bool:
        """Execute one command `[7]` of the simulator; returns whether the task is done."""
        self._measured, _, done, _ = self.env.step(command)
        return bool(done)

    def objects(self) -> dict[str, Vector]:
        """Positions `[3]` (m) of movable objects, by name."""
        return {name: np.array(self.data.body(body).xpos) for name, body in self._bodies.items()}

    def place_of(self, name: str) -> Vector:
        """Position `[3]` (m) of an object or a site."""
        found = self.data.body(self._bodies[name]) if name in self._bodies else self.data.site(name)
        return np.array(found.xpos)

    def place(self, name: str, position: Vector) -> None:
        """Move an object without rotating it; call `refresh` afterwards."""
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
        """The configuration `[nq]`, from which `draw` can render this moment later."""
        return np.array(self.data.qpos, dtype=np.float64)

    def draw(self, configuration: Vector, views: Mapping[str, str] = VIEWS) -> dict[str, npt.NDArray[np.uint8]]:
        """Render upright images `[S, S, 3]` of a configuration, by view; `views` maps them to cameras of the scene."""
        images = {}
        for view in self._update_cameras(configuration, views):
            if self._fast:
                self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
                self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            images[view] = self.renderer.render()
        return images

    def draw_geometry(self, configuration: Vector) -> dict[str, npt.NDArray[np.int32]]:
        """Render the index of the geometry at each pixel `[S, S]`, -1 for none, upright, by view."""
        shown = {}
        self.renderer.enable_segmentation_rendering()
        for view in self._update_cameras(configuration, VIEWS):
            index, kind = np.moveaxis(self.renderer.render(), -1, 0)
            shown[view] = np.where(kind == mujoco.mjtObj.mjOBJ_GEOM, index, -1)
        self.renderer.disable_segmentation_rendering()
        return shown

    def _update_cameras(self, configuration: Vector, views: Mapping[str, str]) -> Iterator[str]:
        """Yield each view after setting up the renderer for its camera and the configuration."""
        self._drawn.qpos[:] = configuration
        mujoco.mj_forward(self.model, self._drawn)
        for view, camera in views.items():
            self.renderer.update_scene(self._drawn, camera, self._visible)
            yield view

    def close(self) -> None:
        """Free the scene and the renderer."""
        self.renderer.close()
        self.env.close()
