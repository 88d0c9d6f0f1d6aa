"""What all engines share: which episode a worker runs next, and retries after a crash."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tokenprune.errors import RolloutError, TokenPruneError
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.starts import Start

CRASHES = 3
"""Crashes of one episode that end the evaluation."""

LIMIT_S = 3600.0
"""Seconds after which an episode counts as hung, which is a crash; a worker's start is part of its first episode."""

POLL_S = 1.0
"""Seconds between checks for hung episodes."""


@dataclass(frozen=True)
class Job:
    """One episode to run: a start, and the label of a variant."""

    start: Start
    variant: str

    def __str__(self) -> str:
        return f"'{self.variant}' from {self.start}"


def plan_jobs(starts: Iterable[Start], labels: Sequence[str]) -> tuple[Job, ...]:
    """Return a job per start and variant; all variants of a start follow each other, so partial results are paired."""
    return tuple(Job(start, label) for start in starts for label in labels)


@dataclass(frozen=True)
class Crash:
    """What a worker returns when its simulator failed; the worker cannot be used any more."""

    why: str


def checked_limit(limit_s: float) -> float:
    """Return the limit.

    Raises:
        RolloutError: If it is not positive.
    """
    if not limit_s > 0:
        raise RolloutError(f"an episode needs some time, not {limit_s:g} s")
    return limit_s


def hung(limit_s: float) -> Crash:
    """Return the crash of an episode that took too long."""
    return Crash(f"it had not ended after {limit_s:g} s")


Outcome = EpisodeRecord | Crash | TokenPruneError
"""What a worker returns for a job; an error ends the evaluation."""


class JobQueue:
    """The episodes that no worker runs yet, in order, and the crashes of each."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = tuple(jobs)
        self._index = {job: index for index, job in enumerate(self._jobs)}
        self._waiting = list(range(len(self._jobs)))
        self._crashes: Counter[Job] = Counter()

    def take(self, last: Job | None) -> Job | None:
        """Return the next episode for a worker: of its open task, else of its environment, else any; None without one.

        Args:
            last: The job that the worker ran before; None for a new worker.
        """

        def distance(index: int) -> tuple[bool, bool]:
            start = self._jobs[self._waiting[index]].start
            if last is None:
                return False, False
            return start.environment != last.start.environment, start.task != last.start.task

        if not self._waiting:
            return None
        # Among equals, `min` returns the first.
        return self._jobs[self._waiting.pop(min(range(len(self._waiting)), key=distance))]

    def settle(self, job: Job, outcome: Outcome) -> EpisodeRecord | None:
        """Handle the outcome of a job.

        Returns:
            The record, with its crashes counted; None if the episode was queued again.

        Raises:
            TokenPruneError: The error that the worker returned.
            RolloutError: If the episode has crashed too often.
        """
        if isinstance(outcome, TokenPruneError):
            raise outcome
        if not isinstance(outcome, Crash):
            return replace(outcome, crashes=self._crashes[job])
        self._crashes[job] += 1
        if self._crashes[job] == CRASHES:
            raise RolloutError(f"{job}: crashed {CRASHES} times; the last time: {outcome.why}")
        bisect.insort(self._waiting, self._index[job])
        return None
