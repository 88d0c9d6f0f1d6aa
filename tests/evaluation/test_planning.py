"""Planning the episodes of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import toy_environment as toy
from tokenprune.errors import ConfigError
from tokenprune.evaluation.planning import initial_states, plan_episodes, plan_exact_episodes
from tokenprune.evaluation.starts import Start, write_starts
from tokenprune.registry.discovery import Registry

REGISTRY = Registry.discover(plugin_files=(Path(toy.__file__),))


@pytest.mark.parametrize(("text", "states"), [("2:4", [2, 3]), ("3,1", [3, 1]), ("7", [7])])
def test_initial_states_as_a_range_and_as_a_list(text: str, states: list[int]) -> None:
    assert initial_states(text) == states


def test_tasks_keep_the_order_in_which_they_were_named() -> None:
    plan = plan_episodes(REGISTRY, ["toy"], {}, 2, [["task_1", 0]], init_states=[3, 1], seed=5)
    assert plan.tasks == {"toy": [1, 0]}
    assert plan.starts == tuple(Start("toy", task, state, 5) for task in (1, 0) for state in (3, 1))


def test_an_environment_named_twice_counts_once() -> None:
    plan = plan_episodes(REGISTRY, ["toy", "toy"], {}, 1, [[0]])
    assert list(plan.suites) == ["toy"]


def test_options_reach_the_environment() -> None:
    with pytest.raises(ConfigError, match="4 initial states"):
        plan_episodes(REGISTRY, ["toy"], {"seeded": False}, 9)


def test_exact_starts_come_from_the_file_alone(tmp_path: Path) -> None:
    listed = [Start("toy", task, state, 0) for task in (2, 0) for state in (1, 3)]
    write_starts(tmp_path / "starts.json", listed)
    plan = plan_exact_episodes(REGISTRY, tmp_path / "starts.json", {})
    assert (plan.starts, plan.tasks) == (tuple(listed), {"toy": [2, 0]})
    first = plan_exact_episodes(REGISTRY, tmp_path / "starts.json", {}, episodes=1)
    assert first.starts == (listed[0], listed[2])


def test_a_start_that_the_environment_lacks_is_refused(tmp_path: Path) -> None:
    write_starts(tmp_path / "starts.json", [Start("toy", 0, 99, 0)])
    with pytest.raises(ConfigError, match="no initial state 99"):
        plan_exact_episodes(REGISTRY, tmp_path / "starts.json", {})
