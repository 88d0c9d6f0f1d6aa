"""Which episode a worker runs next, and what becomes of one whose simulator fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.episode_record import RECORD
from tokenprune.errors import ConfigError, RolloutError
from tokenprune.evaluation.jobs import Crash, Job, JobQueue
from tokenprune.evaluation.starts import Start


def job(environment="toy", task=0, state=0, variant="dense"):
    return Job(Start(environment, task, state, 0), variant)


def test_a_worker_goes_on_with_the_task_it_has_open_else_with_its_environment():
    jobs = [job(e, t, s) for e in ("toy", "play") for t in (0, 1) for s in (0, 1)]
    queue = JobQueue(jobs)
    assert queue.take(None) == job("toy", 0, 0)
    assert queue.take(job("play", 1, 9)) == job("play", 1, 0)
    assert queue.take(job("play", 1, 0)) == job("play", 1, 1)
    assert queue.take(job("play", 1, 1)) == job("play", 0, 0)
    # A task of the same number in another environment is another task.
    assert queue.take(job("toy", 5, 0)) == job("toy", 0, 1)
    assert queue.take(job("else", 1, 0)) == job("toy", 1, 0)


@given(tasks=st.lists(st.integers(0, 2), max_size=12), crashes=st.data())
def test_every_episode_is_run_to_its_end_once_whatever_crashes(tasks, crashes):
    jobs = [job(task=task, state=state) for state, task in enumerate(tasks)]
    queue, last, crashed, ended = JobQueue(jobs), None, dict.fromkeys(jobs, 0), {}
    while (last := queue.take(last)) is not None:
        assert last not in ended
        if crashed[last] < 2 and crashes.draw(st.booleans()):
            crashed[last] += 1
            assert queue.settle(last, Crash("bang")) is None
        else:
            ended[last] = queue.settle(last, RECORD).crashes
    assert ended == crashed


def test_an_episode_that_crashed_has_its_place_again_and_its_crashes_are_counted():
    first, second, third = (job(state=state) for state in range(3))
    queue = JobQueue([first, second, third])
    assert [queue.take(None), queue.take(None)] == [first, second]
    assert queue.settle(second, Crash("bang")) is None
    assert queue.settle(first, Crash("bang")) is None
    assert [queue.take(None), queue.take(None), queue.take(None), queue.take(None)] == [first, second, third, None]
    assert queue.settle(first, Crash("bang")) is None
    assert queue.settle(queue.take(None), RECORD) == replace(RECORD, crashes=2)
    assert queue.settle(second, RECORD) == replace(RECORD, crashes=1)
    assert queue.settle(third, RECORD) == replace(RECORD, crashes=0)


def test_three_crashes_of_one_episode_are_the_end():
    one, other = job(), job(task=4, variant="fastv")
    queue = JobQueue([one, other])
    for crashing in (one, other, one, other):
        queue.take(None)
        assert queue.settle(crashing, Crash("bang")) is None
    with pytest.raises(
        RolloutError,
        match=r"^'fastv' from toy, task 4, initial state 0, seed 0: crashed 3 times; the last time: signal 11$",
    ):
        queue.settle(other, Crash("signal 11"))


def test_what_a_worker_could_not_do_is_raised():
    with pytest.raises(ConfigError, match="no such thing"):
        JobQueue([job()]).settle(job(), ConfigError("no such thing"))
