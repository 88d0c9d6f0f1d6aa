"""Record demonstrations of the scripted expert in LIBERO: states and actions; `draw.py` renders their images.

    python examples/mini_policy/record.py --out data/demos --each 60 --worker 0/2
    python examples/mini_policy/record.py --out data/demos --each 30 --first 1000 --policy mini --worker 0/2

The expert's actions are executed with noise and recorded without it, so the data show how to recover. With `--policy`,
the policy trained so far acts in half of the chunks, and the expert's actions are recorded for the states it reaches
(DAgger, arXiv 1011.0686). Initial states are 0 to 24 of each task with widened positions; 25 to 49 are kept for
evaluation. Existing demonstrations are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from expert import JOBS, Expert
from tasks import ENVIRONMENT_OPTIONS, SPREAD, TASKS, TRAIN_STATES

import tokenprune
from tokenprune.policy import Policy
from tokenprune_adapters.environments.libero.environment import LiberoEnvironment, LiberoFactory

CHUNK = 8
FIRST_SEED = 10_000
POLICY_SHARE = 0.5
"""Share of the chunks in which the policy acts."""

BATCH = 10
"""Demonstrations of one task before the next task's scene is opened."""

Vector = npt.NDArray[np.float64]
ChunkSource = Callable[[int], list[Vector]]


class Noise:
    """Noise on the arm's translation: a slow drift, and an occasional push."""

    def __init__(self, seed: int) -> None:
        """Begin without a push."""
        self._draw = np.random.default_rng(seed)
        self._drift = np.zeros(3)
        self._push, self._left = np.zeros(3), 0

    def __call__(self, near: bool) -> Vector:
        """The next noise `[3]`; weaker near a contact, where the expert itself would fail."""
        self._drift = 0.9 * self._drift + 0.15 * np.sqrt(1 - 0.9**2) * self._draw.normal(size=3)
        if self._left == 0 and self._draw.random() < 1 / 30:
            self._push, self._left = self._draw.uniform(-0.9, 0.9, 3), int(self._draw.integers(3, 8))
        pushed = self._push if self._left else np.zeros(3)
        self._left = max(self._left - 1, 0)
        return (self._drift + pushed) * (0.25 if near else 1.0)


def record(
    environment: LiberoEnvironment,
    task: int,
    noise: Noise | None = None,
    policy_chunk: ChunkSource = lambda step: [],
    after: int = CHUNK,
) -> dict[str, npt.NDArray[np.float32]] | None:
    """The expert's episode from the environment's current state, or None if it failed.

    Args:
        environment: After its reset.
        task: The task of the suite it was reset to.
        noise: Is added to the executed actions, not to the recorded ones.
        policy_chunk: Called at the first step of each chunk; returns the actions to execute instead of the expert's, or
            none to let the expert act.
        after: Control steps recorded after success; one chunk, so that the last query has a whole one.
    """
    simulator = environment.simulator
    expert = Expert(JOBS[environment.suite.name, task])
    chunk: list[Vector] = []
    rows: dict[str, list[Vector]] = {"configuration": [], "state": [], "actions": [], "places": []}
    left = -1
    for step in range(environment.suite.horizon):
        if step % CHUNK == 0:
            chunk = policy_chunk(step)
        action = expert.act(simulator)
        rows["configuration"].append(simulator.configuration)
        rows["state"].append(environment.state)
        rows["actions"].append(action)
        rows["places"].append(
            np.concatenate([simulator.place_of(expert.job.item), simulator.place_of(expert.job.target)])
        )
        executed = action.copy()
        if noise is not None:
            executed[:3] = np.clip(executed[:3] + noise(expert.delicate), -1.0, 1.0)
        if chunk:
            executed = chunk.pop(0)
        if environment.step(executed).success and left < 0:
            left = after
        if left == 0:
            return {key: np.asarray(values, dtype=np.float32) for key, values in rows.items()}
        left -= left > 0
    return None


def demonstrate(
    environment: LiberoEnvironment, task: int, number: int, policy: Policy | None
) -> dict[str, npt.NDArray[np.float32]] | None:
    """One demonstration for training, or None if the expert failed."""
    seed = FIRST_SEED + number
    environment.reset(task, TRAIN_STATES[number % len(TRAIN_STATES)], seed)
    if policy is None:
        return record(environment, task, Noise(seed))
    turns = np.random.default_rng(seed)
    policy.reset(environment.suite.tasks[task].instruction)

    def policy_chunk(step: int) -> list[Vector]:
        return list(policy.act(environment.observe()).actions) if turns.random() < POLICY_SHARE else []

    return record(environment, task, Noise(seed), policy_chunk)


def main() -> None:
    """Record the missing demonstrations of every task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=60, help="demonstrations per task")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--policy", help="a checkpoint that acts in some of the chunks")
    parser.add_argument("--worker", default="0/1", help="which share of the work, such as 0/2 and 1/2")
    arguments = parser.parse_args()
    index, workers = map(int, arguments.worker.split("/"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    environments = {suite: LiberoFactory.build(suite, ENVIRONMENT_OPTIONS | {"spread": SPREAD}) for suite in TASKS}
    policy = (
        tokenprune.load("openvla-oft", checkpoint=arguments.policy, center_crop=False) if arguments.policy else None
    )
    batches = [
        (suite, task, range(first, min(first + BATCH, arguments.first + arguments.each)))
        for first in range(arguments.first, arguments.first + arguments.each, BATCH)
        for suite, tasks in TASKS.items()
        for task in tasks
    ]
    for suite, task, numbers in batches[index::workers]:
        for number in numbers:
            path = arguments.out / f"{suite}-{task}-{number:03d}.npz"
            failed = path.with_suffix(".failed")
            if path.exists() or failed.exists():
                continue
            demonstration = demonstrate(environments[suite], task, number, policy)
            if demonstration is None:
                failed.touch()
                print(f"{path.stem}: the expert failed", flush=True)
                continue
            partial = path.with_suffix(".partial.npz")
            np.savez_compressed(partial, **demonstration)
            partial.rename(path)
            print(f"{path.stem}: {len(demonstration['actions'])} steps", flush=True)


if __name__ == "__main__":
    main()
