r"""Record one episode of the scripted expert, with its images, as a file that `tokenprune` can read.

The episode that ships with the package was made, from the root of the checkout, with

    python examples/mini_policy/episode.py --suite libero_spatial --task 0 --init-state 25 \
        --out adapters/tokenprune_adapters/episodes/libero_spatial.npz

and `examples/three_cameras.npz` with the same and `--side`.

Simulator, images and conventions are those of the mini policy's training. The expert knows the true poses, so the
episode is not the behaviour of a learned policy. A failed episode is not written.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from record import record
from tasks import ENVIRONMENT_OPTIONS, TASKS

from tokenprune.compare.episode import save_episode
from tokenprune_adapters.environments.libero.conventions import SIDE, VIEWS
from tokenprune_adapters.environments.libero.environment import LiberoFactory, pictures

JPEG_QUALITY = 95

AFTER = 24
"""Control steps after success, which is when the bowl first touches the plate; the hand releases it in them."""


def jpeg(picture: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image as JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def drawn_by() -> str:
    """Name the OpenGL implementation that rendered the images; needs an open renderer."""
    from OpenGL import GL  # type: ignore[import-not-found, unused-ignore]

    return ", ".join(GL.glGetString(name).decode() for name in (GL.GL_RENDERER, GL.GL_VERSION))


def main() -> None:
    """Record, render, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=tuple(TASKS), default="libero_spatial")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--init-state", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", action="store_true", help="a third view, from the side")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    environment = LiberoFactory.build(arguments.suite, ENVIRONMENT_OPTIONS)
    environment.reset(arguments.task, arguments.init_state, arguments.seed)
    rows = record(environment, arguments.task, after=AFTER)
    if rows is None:
        raise SystemExit("the expert failed; nothing is written")
    suite, simulator = environment.suite, environment.simulator
    views = VIEWS | SIDE if arguments.side else VIEWS
    moments = [pictures(simulator, configuration, views) for configuration in rows["configuration"]]
    frames = {view: [jpeg(moment[view]) for moment in moments] for view in views}
    meta = {
        "instruction": suite.tasks[arguments.task].instruction,
        "suite": suite.name,
        "task": suite.tasks[arguments.task].name,
        "task_index": arguments.task,
        "init_state_index": arguments.init_state,
        "seed": arguments.seed,
        "success": True,
        "policy": "scripted pick-and-place expert with ground-truth object poses",
        "control_hz": suite.control_hz,
        "image": f"RGB, raw simulator image rotated by 180 degrees, {'all' if arguments.side else 'both'} views",
        "state": "end-effector position 3 (m), axis-angle 3 (rad), gripper joint positions 2 (m)",
        "actions": "OSC_POSE: position delta 3, rotation delta 3, gripper (1 opens, 0 closes)",
        "jpeg": {"quality": JPEG_QUALITY, "chroma_subsampling": "4:4:4"},
        "environment": dict(suite.settings) | {"renderer": f"{os.environ['MUJOCO_GL']}: {drawn_by()}"},
    }
    written = save_episode(arguments.out, frames, rows["state"], rows["actions"], meta)
    print(f"{len(written)} steps, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
