"""Where episodes begin: one list of starts for every variant, planned or read from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError, nearest
from tokenprune.evaluation.environment import Suite, Task


@dataclass(frozen=True, order=True)
class Start:
    """Where one episode begins.

    Attributes:
        environment: Registered name.
        task: Index of the task.
        init_state: Index of the task's initial state.
        seed: Seed of whatever else the environment draws at random.
    """

    environment: str
    task: int
    init_state: int
    seed: int

    def __str__(self) -> str:
        return f"{self.environment}, task {self.task}, initial state {self.init_state}, seed {self.seed}"


def plan_starts(
    suite: Suite,
    tasks: Sequence[str | int] | None,
    episodes: int,
    init_states: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Start, ...]:
    """Return the first `episodes` starts of each task: the initial states in turn, with the next seed after each round.

    Args:
        suite: The environment.
        tasks: Indices or names; all tasks when left out.
        episodes: Number for each task.
        init_states: Initial states in their order; all of the task's when left out.
        seed: Seed of the first round.

    Raises:
        ConfigError: If there is no such task or initial state, one is named twice, or there are more episodes than
            different starts.
    """
    if episodes < 1:
        raise ConfigError(f"episodes: at least 1 of each task, not {episodes}")
    if seed < 0:
        raise ConfigError(f"seed: 0 or more, not {seed}")
    chosen = [_task(suite, name) for name in tasks] if tasks is not None else list(suite.tasks)
    _refuse_repeats(suite.name, "task", [task.index for task in chosen])
    starts: list[Start] = []
    for task in chosen:
        states = range(task.init_states) if init_states is None else init_states
        _refuse_repeats(suite.name, "initial state", states)
        for state in states:
            _check_state(suite.name, task, state)
        if not states:
            raise ConfigError(f"'{suite.name}': no initial state to begin task {task.index} in")
        if episodes > len(states) and not suite.seeded:
            raise ConfigError(
                f"{episodes} episodes of each task were asked for, but task {task.index} of '{suite.name}' has "
                f"{len(states)} initial states to begin in, and its seed changes nothing, so that episodes would be "
                f"repeated; ask for {len(states)} at most, or name more initial states or tasks, or choose an option "
                "of the environment that lets the seed vary where an episode begins"
            )
        starts += [
            Start(suite.name, task.index, states[k % len(states)], seed + k // len(states)) for k in range(episodes)
        ]
    return tuple(starts)


def first_of_each_task(starts: Iterable[Start], episodes: int) -> tuple[Start, ...]:
    """Return the first `episodes` starts of each task, in their order.

    Raises:
        ConfigError: If `episodes` is not positive, or a task has fewer starts.
    """
    if episodes < 1:
        raise ConfigError(f"episodes: at least 1 of each task, not {episodes}")
    by_task: dict[tuple[str, int], list[Start]] = {}
    for start in starts:
        by_task.setdefault((start.environment, start.task), []).append(start)
    for (environment, task), own in by_task.items():
        if len(own) < episodes:
            raise ConfigError(
                f"{episodes} episodes of each task were asked for, but there are {len(own)} starts for task {task} "
                f"of '{environment}'"
            )
    return tuple(start for own in by_task.values() for start in own[:episodes])


def check_starts(starts: Iterable[Start], suites: Mapping[str, Suite]) -> None:
    """Refuse starts that the environments do not have.

    Args:
        starts: Planned or read from a file.
        suites: What each environment offers, by name.

    Raises:
        ConfigError: If the environment, task or initial state of a start does not exist.
    """
    for start in starts:
        if start.environment not in suites:
            raise ConfigError(f"no environment '{start.environment}' is evaluated{nearest(start.environment, suites)}")
        suite = suites[start.environment]
        _check_state(suite.name, _task(suite, start.task), start.init_state)


def write_starts(path: Path, starts: Iterable[Start]) -> None:
    """Write starts as a JSON list, one to a line, so that others can evaluate exactly the same episodes."""
    lines = ",\n".join(json.dumps(asdict(start)) for start in starts)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_starts(path: Path) -> tuple[Start, ...]:
    """Read starts from a file as `write_starts` makes it.

    Raises:
        ConfigError: If it is not a JSON list of different starts, with the number of the entry, counted from 0.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: starts cannot be read: {error}") from error
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: starts are a JSON list of {_example()}")
    starts: dict[Start, int] = {}
    for number, entry in enumerate(data):
        start = _start(entry, f"{path}: entry {number}")
        if start in starts:
            raise ConfigError(f"{path}: entry {number} is the same start as entry {starts[start]}")
        starts[start] = number
    return tuple(starts)


def _start(entry: Any, where: str) -> Start:  # noqa: ANN401 - whatever the file holds
    fields = {"environment": str, "task": int, "init_state": int, "seed": int}
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is {entry!r:.60}; a start is {_example()}")
    for key in entry:
        if key not in fields:
            raise ConfigError(f"{where} has an unknown key '{key}'{nearest(key, fields)}")
    for key, kind in fields.items():
        if key not in entry:
            raise ConfigError(f"{where} lacks '{key}'; a start is {_example()}")
        # JSON's true would pass for 1.
        if type(entry[key]) is not kind or (kind is int and entry[key] < 0):
            wanted = "a name" if kind is str else "0 or a positive whole number"
            raise ConfigError(f"{where}: {key} must be {wanted}, got {entry[key]!r:.60}")
    return Start(**entry)


def _example() -> str:
    return json.dumps(asdict(Start("libero_goal", 3, 0, 0)))


def _task(suite: Suite, name: str | int) -> Task:
    text = str(name)
    for task in suite.tasks:
        if text in (str(task.index), task.name):
            return task
    if text.lstrip("-").isdigit():
        raise ConfigError(f"'{suite.name}' has no task {text}; it has tasks 0 to {len(suite.tasks) - 1}")
    raise ConfigError(f"'{suite.name}' has no task '{text}'{nearest(text, [task.name for task in suite.tasks])}")


def _check_state(environment: str, task: Task, state: int) -> None:
    if not 0 <= state < task.init_states:
        raise ConfigError(
            f"task {task.index} of '{environment}' has no initial state {state}; it has 0 to {task.init_states - 1}"
        )


def _refuse_repeats(environment: str, what: str, numbers: Sequence[int]) -> None:
    for number in numbers:
        if numbers.count(number) > 1:
            raise ConfigError(f"'{environment}': {what} {number} is named twice")
