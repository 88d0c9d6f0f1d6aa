"""List held-out starts that the expert solves, for `tokenprune eval --starts`.

    python examples/mini_policy/starts.py --out examples/mini_policy/starts-widened.json --each 50 --workers 2
    python examples/mini_policy/starts.py --out examples/mini_policy/starts-stock.json --each 50 --workers 2 --stock

Policies are only evaluated from starts that the expert solves. Widened: the first 50 solved starts of each task, from
initial states 25 to 49 with up to 20 seeds each. Stock: the solved ones of the 25 states. The number of tries is
printed. With a larger `--each`, starts are added to an existing file.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

from expert import JOBS, Expert
from tasks import ENVIRONMENT_OPTIONS, SPREAD, TASKS, TEST_STATES

from tokenprune.evaluation.starts import Start, read_starts, write_starts
from tokenprune_adapters.environments.libero.environment import LiberoEnvironment, LiberoFactory

SEEDS = 20


@dataclass(frozen=True)
class Search:
    """A search for starts of one task, which continues after the known ones."""

    suite: str
    task: int
    stock: bool
    known: tuple[Start, ...]
    each: int

    def run(self) -> tuple[tuple[Start, ...], int]:
        """All starts found so far, and the number of tries for the new ones."""
        options = ENVIRONMENT_OPTIONS | ({} if self.stock else {"spread": SPREAD})
        environment = LiberoFactory.build(self.suite, options)
        seeds = range(1 if self.stock else SEEDS)
        every = [Start(self.suite, self.task, state, seed) for seed in seeds for state in TEST_STATES]
        found, first = list(self.known), every.index(self.known[-1]) + 1 if self.known else 0
        tried = 0
        for start in every[first:]:
            if len(found) >= self.each:
                break
            tried += 1
            if solved(environment, start):
                found.append(start)
        environment.close()
        return tuple(found), tried


def solved(environment: LiberoEnvironment, start: Start) -> bool:
    """Whether the expert, without noise, succeeds from this start."""
    environment.reset(start.task, start.init_state, start.seed)
    expert = Expert(JOBS[start.environment, start.task])
    return any(environment.step(expert.act(environment.simulator)).success for _ in range(environment.suite.horizon))


def main() -> None:
    """Try starts until there are enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=50, help="starts of each task")
    parser.add_argument("--stock", action="store_true", help="initial positions as LIBERO has them, one seed")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    tasks = [(suite, task) for suite, numbers in TASKS.items() for task in numbers]
    found: dict[tuple[str, int], list[Start]] = {key: [] for key in tasks}
    for start in read_starts(arguments.out) if arguments.out.exists() else ():
        found[start.environment, start.task].append(start)
    searches = [Search(*key, arguments.stock, tuple(found[key]), arguments.each) for key in tasks]
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for (suite, task), (starts, tried) in zip(tasks, pool.imap(Search.run, searches), strict=True):
            print(f"{suite} {task}: {len(starts) - len(found[suite, task])} of {tried} solved", flush=True)
            found[suite, task] = list(starts)
            write_starts(arguments.out, [start for key in tasks for start in found[key]])


if __name__ == "__main__":
    main()
