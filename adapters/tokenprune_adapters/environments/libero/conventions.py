"""How OpenVLA and OpenVLA-OFT see LIBERO and act in it (upstream OpenVLA-OFT, its LIBERO evaluation)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

VIEWS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
"""Camera of the simulator for each view."""

SIDE = {"side": "sideview"}
"""One more camera of the scene, for recordings that policies with three cameras can look at."""

CONTROL_HZ = 20
"""Control steps per second."""

SETTLE_STEPS = 10
"""Control steps in which objects fall into place before an episode begins."""

OPEN, CLOSE = -1.0, 1.0
"""What the simulator's gripper understands."""

SETTLE_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN])

_THRESHOLD = 0.5

Vector = npt.NDArray[np.float64]


def mirrored(drawn: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture policies are trained on, `[H, W, 3]`, of an upright one.

    They are trained on OpenGL's pictures, whose rows run upwards, rotated by 180 degrees: the top is up again, and
    left and right are exchanged.
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
    """What the simulator executes for a policy's action `[7]`.

    The first six numbers are shares of the controller's largest step, as they are. A policy's gripper is 1 for open
    and 0 for closed, the simulator's -1 and 1; what lies between is decided at one half.
    """
    wanted = np.array(action, dtype=np.float64)
    wanted[6] = OPEN if wanted[6] > _THRESHOLD else CLOSE
    return wanted
