"""Starts: planned in rounds over initial states, refused where they would repeat, shared through a file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import ConfigError
from tokenprune.evaluation.environment import Suite, Task
from tokenprune.evaluation.jobs import Job, plan_jobs
from tokenprune.evaluation.starts import Start, check_starts, first_of_each_task, plan_starts, read_starts, write_starts


def suite(*states: int, seeded: bool = True, name: str = "toy") -> Suite:
    tasks = tuple(Task(i, f"reach_{'abcdefgh'[i]}", f"reach {i}", count) for i, count in enumerate(states))
    return Suite(name, tasks, ("primary",), 10, 20.0, {}, seeded)


@given(
    states=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    episodes=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_every_task_begins_in_its_states_in_turn_with_the_next_seed_each_round(states, episodes, seed):
    starts = list(plan_starts(suite(*states), None, episodes, seed=seed))
    for task, count in enumerate(states):
        state, now = 0, seed
        for _ in range(episodes):
            assert starts.pop(0) == Start("toy", task, state, now)
            state += 1
            if state == count:
                state, now = 0, now + 1
    assert starts == []


def test_tasks_and_states_are_taken_as_they_are_named():
    starts = plan_starts(suite(4, 4, 4), ["2", "reach_a"], 3, init_states=[3, 1])
    assert starts == (
        Start("toy", 2, 3, 0), Start("toy", 2, 1, 0), Start("toy", 2, 3, 1),
        Start("toy", 0, 3, 0), Start("toy", 0, 1, 0), Start("toy", 0, 3, 1),
    )  # fmt: skip


def test_the_first_starts_of_each_task_are_those_a_list_names_first():
    listed = [Start(*entry) for entry in (("toy", 1, 5, 0), ("other", 1, 2, 0), ("toy", 1, 3, 0), ("other", 1, 0, 4))]
    assert first_of_each_task(listed, 1) == (listed[0], listed[1])
    assert first_of_each_task(listed, 2) == (listed[0], listed[2], listed[1], listed[3])
    with pytest.raises(ConfigError, match=r"3 episodes .* there are 2 starts for task 1 of 'toy'"):
        first_of_each_task(listed, 3)
    with pytest.raises(ConfigError, match="at least 1 of each task, not 0"):
        first_of_each_task(listed, 0)


def test_no_episode_is_repeated_where_the_seed_changes_nothing():
    still = suite(3, 2, seeded=False)
    assert len(plan_starts(still, ["0"], 3)) == 3
    with pytest.raises(
        ConfigError, match=r"3 episodes .* task 1 of 'toy' has 2 initial states .* 2 at most, or name mo"
    ):
        plan_starts(still, None, 3)
    with pytest.raises(ConfigError, match="task 0 of 'toy' has 1 initial states"):
        plan_starts(still, ["0"], 2, init_states=[2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ["reach_q"]}, r"'toy' has no task 'reach_q'; did you mean 'reach_[abc]'\? valid: reach_a, reach_b"),
        ({"tasks": ["3"]}, "'toy' has no task 3; it has tasks 0 to 2"),
        ({"tasks": ["-1"]}, "'toy' has no task -1; it has tasks 0 to 2"),
        ({"tasks": ["1", "reach_b"]}, "'toy': task 1 is named twice"),
        ({"init_states": [0, 4]}, "task 0 of 'toy' has no initial state 4; it has 0 to 3"),
        ({"init_states": [-1]}, "has no initial state -1"),
        ({"init_states": [1, 2, 1]}, "'toy': initial state 1 is named twice"),
        ({"init_states": []}, "no initial state to begin task 0 in"),
        ({"episodes": 0}, "episodes: at least 1 of each task, not 0"),
        ({"seed": -1}, "seed: 0 or more, not -1"),
    ],
)
def test_what_there_is_not_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        plan_starts(suite(4, 4, 4), **{"tasks": None, "episodes": 2, **changed})


def test_starts_are_checked_against_what_is_evaluated():
    suites = {"toy": suite(2, 1), "play": suite(1, name="play")}
    check_starts([Start("toy", 0, 1, 9), Start("play", 0, 0, 0)], suites)
    for start, message in (
        (Start("toi", 0, 0, 0), "no environment 'toi' is evaluated; did you mean 'toy'"),
        (Start("toy", 2, 0, 0), "'toy' has no task 2"),
        (Start("toy", 1, 1, 0), "task 1 of 'toy' has no initial state 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_starts([start], suites)


START = st.builds(Start, st.sampled_from(["toy", "play"]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))


@given(starts=st.lists(START, min_size=1, unique=True))
def test_written_starts_are_read_again(tmp_path_factory, starts):
    path = tmp_path_factory.getbasetemp() / "starts.json"
    write_starts(path, starts)
    assert read_starts(path) == tuple(starts)
    assert len(json.loads(path.read_text())) == len(starts)


GOOD = {"environment": "toy", "task": 0, "init_state": 0, "seed": 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[", "starts.json: starts cannot be read: Expecting value"),
        ({}, "starts.json: starts are a JSON list of"),
        ([], "starts.json: starts are a JSON list of"),
        ([GOOD, 3], "entry 1 is 3; a start is"),
        ([GOOD, {**GOOD, "task": 1}, GOOD], "entry 2 is the same start as entry 0"),
        ([{**GOOD, "sed": 1}], "entry 0 has an unknown key 'sed'; did you mean 'seed'"),
        ([GOOD, {"environment": "toy", "task": 1, "seed": 0}], "entry 1 lacks 'init_state'"),
        ([{**GOOD, "task": -1}], "entry 0: task must be 0 or a positive whole number, got -1"),
        ([{**GOOD, "task": True}], "entry 0: task must be 0 or a positive whole number, got True"),
        ([{**GOOD, "seed": 1.0}], "entry 0: seed must be 0 or a positive whole number, got 1.0"),
        ([{**GOOD, "environment": None}], "entry 0: environment must be a name, got None"),
    ],
)
def test_what_is_no_list_of_starts_is_refused(tmp_path, data, message):
    path = tmp_path / "starts.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        read_starts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json: starts cannot be read: .*No such file"):
        read_starts(tmp_path / "nowhere.json")


def test_all_variants_of_a_start_are_beside_each_other():
    first, second = Start("toy", 0, 0, 0), Start("toy", 0, 1, 0)
    jobs = plan_jobs([first, second], ["a", "b"])
    assert jobs == (Job(first, "a"), Job(first, "b"), Job(second, "a"), Job(second, "b"))
