"""Cameras, state and actions of OpenVLA and OpenVLA-OFT in LIBERO (upstream OpenVLA-OFT's evaluation)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

VIEWS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
"""Camera of the simulator for each view."""

SIDE = {"side": "sideview"}
"""A third camera, for recordings for policies with three views."""

CONTROL_HZ = 20
"""Control steps per second."""

SETTLE_STEPS = 10
"""Control steps before an episode begins, in which objects come to rest."""

OPEN, CLOSE = -1.0, 1.0
"""The simulator's gripper commands."""

SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN])

_THRESHOLD = 0.5

Vector = npt.NDArray[np.float64]


def mirrored(drawn: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Mirror an upright image `[H, W, 3]`, because policies are trained on mirrored ones.

    Their training data are OpenGL's images, whose first row is the lowest, rotated by 180 degrees: the result is
    upright, with left and right exchanged.
    """
    return np.ascontiguousarray(drawn[:, ::-1])


def axis_angle(quaternion: Vector) -> Vector:
    """Turn a unit quaternion (x, y, z, w) into axis times angle `[3]`, angle in [0, 2 pi] (upstream robosuite)."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if sine < 1e-9 else quaternion[:3] * (2.0 * np.arccos(w) / sine)


def robot_state(position: Vector, quaternion: Vector, gripper: Vector) -> Vector:
    """Proprioception `[8]`: end-effector position (m), its axis-angle (rad), the two gripper joints (m)."""
    return np.concatenate([position, axis_angle(quaternion), gripper])


def command(action: npt.NDArray[np.floating]) -> Vector:
    """The simulator's command for a policy's action `[7]`.

    The first six numbers are shares of the controller's largest step and are passed on. A policy's gripper is 1 for
    open and 0 for closed, the simulator's -1 and 1; the threshold is one half.
    """
    wanted = np.array(action, dtype=np.float64)
    wanted[6] = OPEN if wanted[6] > _THRESHOLD else CLOSE
    return wanted
