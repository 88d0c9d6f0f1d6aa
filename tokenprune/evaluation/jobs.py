"""What all engines share: who runs which episode next, and what becomes of one whose simulator fails."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokenprune.errors import RolloutError, TokenPruneError
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.starts import Start

CRASHES = 3
"""So many crashes of one episode end the evaluation."""


LIMIT_S = 3600.0
"""An episode that takes longer has hung, which counts as a crash; a worker's start is part of its first."""


GLANCE_S = 1.0
"""Seconds between looks at whether an episode has hung."""


@dataclass(frozen=True)
class Job:
    """One episode to run: a start, and the label of a variant."""

    start: Start
    variant: str

    def __str__(self) -> str:
        return f"'{self.variant}' from {self.start}"


def plan_jobs(starts: Iterable[Start], labels: Sequence[str]) -> tuple[Job, ...]:
    """All variants of a start beside each other, so that partial results are paired."""
    return tuple(Job(start, label) for start in starts for label in labels)


@dataclass(frozen=True)
class Crash:
    """A worker answers this when its simulator failed; it cannot be used any more."""

    why: str


def checked_limit(limit_s: float) -> float:
    """The limit, if it is one.

    Raises:
        RolloutError: If it is not positive.
    """
    if not limit_s > 0:
        raise RolloutError(f"an episode needs some time, not {limit_s:g} s")
    return limit_s


def hung(limit_s: float) -> Crash:
    """What becomes of an episode that takes too long."""
    return Crash(f"it had not ended after {limit_s:g} s")


Answer = EpisodeRecord | Crash | TokenPruneError
"""What a worker says about a job; an error ends the evaluation."""


class JobQueue:
    """The episodes that nobody runs yet, in order, and how often each has crashed."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = tuple(jobs)
        self._place = {job: place for place, job in enumerate(self._jobs)}
        self._waiting = list(range(len(self._jobs)))
        self._crashes: Counter[Job] = Counter()

    def take(self, last: Job | None) -> Job | None:
        """The next episode for a worker, if there is one: of the task it has open, else of its environment, else any.

        Args:
            last: What the worker ran before.
        """

        def distance(index: int) -> tuple[bool, bool]:
            start = self._jobs[self._waiting[index]].start
            if last is None:
                return False, False
            return start.environment != last.start.environment, start.task != last.start.task

        if not self._waiting:
            return None
        # Of equals, `min` returns the first.
        return self._jobs[self._waiting.pop(min(range(len(self._waiting)), key=distance))]

    def settle(self, job: Job, answer: Answer) -> EpisodeRecord | None:
        """Take what a worker answered.

        Returns:
            The record, with its crashes counted; None if the episode has been put back.

        Raises:
            TokenPruneError: What the worker could not do.
            RolloutError: If the episode has crashed too often.
        """
        if isinstance(answer, TokenPruneError):
            raise answer
        if not isinstance(answer, Crash):
            return replace(answer, crashes=self._crashes[job])
        self._crashes[job] += 1
        if self._crashes[job] == CRASHES:
            raise RolloutError(f"{job}: crashed {CRASHES} times; the last time: {answer.why}")
        bisect.insort(self._waiting, self._place[job])
        return None
