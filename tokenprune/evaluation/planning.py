"""Plans the episodes of an evaluation: which environments, and where each episode begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.evaluation.environment import Suite
from tokenprune.evaluation.starts import Start, check_starts, first_of_each_task, plan_starts, read_starts
from tokenprune.registry.discovery import Registry


@dataclass(frozen=True)
class EpisodePlan:
    """The episodes that every variant runs.

    Attributes:
        suites: What each environment offers, by name.
        options: The environments' own options.
        starts: Where the episodes begin, in order; every one exists in its suite.
    """

    suites: Mapping[str, Suite]
    options: Mapping[str, Any]
    starts: tuple[Start, ...]

    @property
    def tasks(self) -> dict[str, list[int]]:
        """Indices of the evaluated tasks of each environment, in the order of the starts."""
        tasks: dict[str, dict[int, None]] = {name: {} for name in self.suites}
        for start in self.starts:
            tasks[start.environment][start.task] = None
        return {name: list(indices) for name, indices in tasks.items()}


def plan_episodes(
    registry: Registry,
    environments: Sequence[str],
    options: Mapping[str, Any],
    episodes: int,
    tasks: Sequence[Sequence[str | int]] = (),
    init_states: Sequence[int] | None = None,
    seed: int = 0,
) -> EpisodePlan:
    """Plan `episodes` starts of each task.

    Args:
        registry: Discovered plugins.
        environments: Registered names.
        options: The environments' own.
        episodes: How many of each task.
        tasks: Indices or names, a list for each environment; all tasks when empty.
        init_states: Initial states to begin in, in this order; all of each task when left out.
        seed: Seed of the first round through the initial states.

    Raises:
        PluginError: If an environment is unknown.
        ConfigError: If an option, a task or an initial state is wrong, or there are fewer starts than episodes.
        SimulatorError: If something is missing that an environment needs.
    """
    suites = _suites(registry, environments, options)
    if tasks and len(tasks) != len(suites):
        raise ConfigError(f"--tasks was given {len(tasks)} times for {len(suites)} environments; give it once for each")
    chosen: Sequence[Sequence[str | int] | None] = tasks or [None] * len(suites)
    plans = [plan_starts(s, own, episodes, init_states, seed) for s, own in zip(suites.values(), chosen, strict=True)]
    return EpisodePlan(suites, options, tuple(start for plan in plans for start in plan))


def plan_exact_episodes(
    registry: Registry, path: Path, options: Mapping[str, Any], episodes: int | None = None
) -> EpisodePlan:
    """Plan the starts of a file that `write_starts` wrote.

    Args:
        registry: Discovered plugins.
        path: The file.
        options: The environments' own.
        episodes: The first so many of each task; all when left out.

    Raises:
        PluginError: If an environment is unknown.
        ConfigError: If the file, an option or a start is wrong, or a task has fewer starts than `episodes`.
        SimulatorError: If something is missing that an environment needs.
    """
    starts = read_starts(path)
    if episodes is not None:
        starts = first_of_each_task(starts, episodes)
    suites = _suites(registry, (start.environment for start in starts), options)
    check_starts(starts, suites)
    return EpisodePlan(suites, options, starts)


def initial_states(text: str) -> list[int]:
    """Read a range `25:50`, which ends before 50, or a list `0,3,7`.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        first, colon, end = text.partition(":")
        return list(range(int(first), int(end))) if colon else [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--init-states {text}: write 25:50, which leaves out 50, or 0,3,7") from None


def _suites(registry: Registry, names: Iterable[str], options: Mapping[str, Any]) -> dict[str, Suite]:
    return {name: registry.environment_factory(name).describe(name, options) for name in dict.fromkeys(names)}
