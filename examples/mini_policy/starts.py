"""List held-out starts that the expert solves, for `tokenprune eval --starts`.

    python examples/mini_policy/starts.py --out examples/mini_policy/starts-widened.json --each 50
    python examples/mini_policy/starts.py --out examples/mini_policy/starts-stock.json --stock

A start that no expert solves says nothing about a policy. Widened: the first 50 solved ones of each task, from initial
states 25 to 49 with as many seeds as it takes. Stock: all of these states that are solved. What the expert failed at is
counted and printed. Tasks that the file has are not tried again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from expert import JOBS, Expert
from tasks import ENVIRONMENT_OPTIONS, SPREAD, TASKS, TEST_STATES

from tokenprune.rollout.starts import Start, read_starts, write_starts
from tokenprune_adapters.environments.libero.environment import LiberoEnvironment, LiberoFactory


def solved(environment: LiberoEnvironment, start: Start) -> bool:
    """Whether the expert, without noise, does the task from here."""
    environment.reset(start.task, start.init_state, start.seed)
    expert = Expert(JOBS[start.environment, start.task])
    return any(environment.step(expert.act(environment.simulator)).success for _ in range(environment.suite.horizon))


def main() -> None:
    """Try starts until there are enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=50, help="starts of each task")
    parser.add_argument("--stock", action="store_true", help="initial positions as LIBERO has them, one seed")
    arguments = parser.parse_args()
    found = list(read_starts(arguments.out)) if arguments.out.exists() else []
    for suite, tasks in TASKS.items():
        options = ENVIRONMENT_OPTIONS | ({} if arguments.stock else {"spread": SPREAD})
        environment = LiberoFactory.build(suite, options)
        for task in tasks:
            if any((start.environment, start.task) == (suite, task) for start in found):
                continue
            mine: list[Start] = []
            tried = 0
            seeds = range(1 if arguments.stock else 20)
            for start in (Start(suite, task, state, seed) for seed in seeds for state in TEST_STATES):
                if len(mine) == arguments.each:
                    break
                tried += 1
                if solved(environment, start):
                    mine.append(start)
            found += mine
            write_starts(arguments.out, found)
            print(f"{suite} {task}: {len(mine)} of {tried} solved", flush=True)
        environment.close()


if __name__ == "__main__":
    main()
