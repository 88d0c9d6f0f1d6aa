"""Render the camera images of recorded demonstrations, and labels of the objects in them.

    python examples/mini_policy/draw.py --demos data/demos --out data/frames --worker 0/2

Each demonstration gets one file of images, uint8 `[n, views, 224, 224, 3]`, which are the policy's inputs, and one of
labels, uint8 `[n / 3, views, 112, 112]`: an index into `KINDS` for every second pixel of every third image. Existing
files are kept.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pictures import KINDS, LABELLED, steps_of
from record import FIRST_SEED
from tasks import ENVIRONMENT_OPTIONS

from tokenprune_adapters.environments.libero.conventions import VIEWS, mirrored
from tokenprune_adapters.environments.libero.environment import pictures
from tokenprune_adapters.environments.libero.simulator import Simulator
from tokenprune_adapters.environments.libero.suites import LiberoSuite


def kind_of(body: str) -> int:
    """Index of the kind of a body of the scene."""
    # The last kind first, because the stove has a burner plate, which is no plate.
    for kind in reversed(KINDS[3:]):
        if kind in body:
            return KINDS.index(kind)
    if body.startswith("gripper"):
        return KINDS.index("gripper")
    return KINDS.index("robot" if body.startswith("robot") else "background")


def kinds_of(simulator: Simulator) -> npt.NDArray[np.uint8]:
    """Kind of each geometry; the last entry, which index -1 reads, is the background."""
    model = simulator.model
    bodies = [model.body(model.geom_bodyid[geom]).name for geom in range(model.ngeom)]
    return np.array([kind_of(body) for body in bodies] + [0], dtype=np.uint8)


def main() -> None:
    """Render the missing files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--demos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", default="0/1", help="which share of the work, such as 0/2 and 1/2")
    arguments = parser.parse_args()
    index, workers = map(int, arguments.worker.split("/"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = sorted(p for p in arguments.demos.glob("*.npz") if ".partial" not in p.name)
    by_task = {key: list(paths) for key, paths in itertools.groupby(found, lambda path: path.stem.rsplit("-", 1)[0])}
    for key in list(by_task)[index::workers]:
        suite, task = key.rsplit("-", 1)
        missing = [path for path in by_task[key] if not (arguments.out / f"{path.stem}.labels.npy").exists()]
        if not missing:
            continue
        libero = LiberoSuite(suite)
        simulator = Simulator(libero.task_file(int(task)), ENVIRONMENT_OPTIONS["size"], "fast")
        first = libero.init_states(int(task))[0]
        kinds = kinds_of(simulator)
        for path in missing:
            with np.load(path) as demonstration:
                configurations = demonstration["configuration"]
            number = int(path.stem.rsplit("-", 1)[1])
            # The seed also determines the positions of fixed objects.
            simulator.begin(first, FIRST_SEED + number)
            steps = steps_of(len(configurations), number)
            frames, labels = [], []
            for row, step in enumerate(steps):
                drawn = pictures(simulator, configurations[step])
                frames.append([drawn[view] for view in VIEWS])
                if row % LABELLED == 0:
                    shown = simulator.draw_geometry(configurations[step])
                    labels.append([mirrored(kinds[shown[view]])[1::2, ::2] for view in VIEWS])
            np.save(arguments.out / f"{path.stem}.frames.npy", np.asarray(frames))
            np.save(arguments.out / f"{path.stem}.labels.npy", np.asarray(labels))
            print(f"{path.stem}: {len(steps)} moments", flush=True)
        simulator.close()


if __name__ == "__main__":
    main()
