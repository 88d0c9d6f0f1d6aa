"""LIBERO's suites: their tasks, initial states and horizons."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune.errors import SimulatorError, nearest
from tokenprune_adapters.environments.libero.conventions import Vector

HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps of an episode (upstream OpenVLA-OFT)."""


class LiberoSuite:
    """The tasks of one suite."""

    def __init__(self, name: str) -> None:
        """Read the suite's list of tasks.

        Raises:
            SimulatorError: If LIBERO is not installed or does not have the suite.
        """
        if name not in HORIZONS:
            raise SimulatorError(f"LIBERO has no suite '{name}'{nearest(name, HORIZONS)}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from libero.libero.benchmark import get_benchmark

                self._suite: Any = get_benchmark(name)()
        except ImportError as error:
            raise SimulatorError(
                f"LIBERO cannot be imported ({error}); install the extra: pip install 'tokenprune-vla[libero]'"
            ) from error
        self.name = name
        self.horizon = HORIZONS[name]
        self._init_states: dict[int, Vector] = {}
        self.tasks: list[tuple[str, str]] = [(task.name, task.language) for task in self._suite.tasks]

    def task_file(self, task: int) -> Path:
        """The definition of a task."""
        return Path(self._suite.get_task_bddl_file_path(task))

    def init_states(self, task: int) -> Vector:
        """Flattened initial states of a task, `[N, S]`."""
        if task not in self._init_states:
            states = np.asarray(self._suite.get_task_init_states(task), dtype=np.float64)
            states.flags.writeable = False
            self._init_states[task] = states
        return self._init_states[task]

    def targets(self) -> frozenset[str]:
        """Names of the objects and sites that the suite's tasks are about."""
        from libero.libero.envs import bddl_utils

        files = (str(self.task_file(task)) for task in range(len(self.tasks)))
        return frozenset(name for file in files for name in bddl_utils.robosuite_parse_problem(file)["obj_of_interest"])
