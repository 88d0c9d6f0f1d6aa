"""Runs episodes in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from time import monotonic

from tokenprune.errors import RolloutError
from tokenprune.evaluation.jobs import GLANCE_S, LIMIT_S, Answer, Crash, Job, JobQueue, checked_limit, hung
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.worker import Attempts, WorkerSpec

_SPAWN = multiprocessing.get_context("spawn")


_PATIENCE_S = 10.0
"""A worker without work frees its simulator and ends by itself; after so long it is ended."""


class LocalEngine:
    """Processes of this machine, each with a backbone and a simulator of its own."""

    def __init__(self, workers: int = 1, threads: int = 1, limit_s: float = LIMIT_S) -> None:
        """Nothing is started before `run`.

        Args:
            workers: Processes.
            threads: torch threads of each.
            limit_s: Seconds after which an episode has hung.

        Raises:
            RolloutError: If there is less than one worker or thread, or no time.
        """
        if workers < 1 or threads < 1:
            raise RolloutError(f"at least 1 worker with 1 thread, not {workers} with {threads}")
        self.workers, self.threads, self.limit_s = workers, threads, checked_limit(limit_s)

    def run(self, spec: WorkerSpec, jobs: Sequence[Job]) -> Iterator[EpisodeRecord]:
        """Run episodes; yields their records as they end.

        A process that dies or hangs, or whose simulator fails, is replaced and its episode run again. However this
        ends, no process is left behind.

        Raises:
            RolloutError: If one episode crashes three times, or a worker cannot go on.
            TokenPruneError: What a worker raised.
        """
        spec, queue = replace(spec, threads=self.threads), JobQueue(jobs)
        crew: list[_Process] = []
        try:
            for _ in range(min(self.workers, len(jobs))):
                crew.append(_Process(spec))
                crew[-1].begin(queue.take(None))
            while busy := {process.connection: process for process in crew if process.job is not None}:
                answered = wait(list(busy), GLANCE_S)
                for connection, process in busy.items():
                    if connection in answered:
                        answer = process.answer()
                    elif monotonic() - process.since > self.limit_s:
                        answer = hung(self.limit_s)
                    else:
                        continue
                    job = process.job
                    assert job is not None
                    if isinstance(answer, Crash):
                        process.dismiss()
                        process.end()
                        crew.remove(process)
                    record = queue.settle(job, answer)
                    if process not in crew:
                        process = _Process(spec)
                        crew.append(process)
                    process.begin(queue.take(job))
                    if record is not None:
                        yield record
        finally:
            for process in crew:
                process.dismiss()
            for process in crew:
                process.end()


class _Process:
    """A worker's process, as the parent sees it."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Start it."""
        self.job: Job | None = None
        self.since = monotonic()
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, spec), daemon=True)
        # Ctrl-C in a terminal goes to every process of the group, and is the parent's alone to answer: a child inherits
        # what is blocked. The tracker is started first, because it unblocks the signal when it is.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, job: Job | None) -> None:
        """Give it something to do; without a job it frees its simulator and ends."""
        self.job, self.since = job, monotonic()
        if job is None:
            self.dismiss()
            return
        # One that has died meanwhile is found out by what it does not answer.
        with suppress(BrokenPipeError):
            self.connection.send(job)

    def answer(self) -> Answer:
        """What became of the job."""
        try:
            answer: Answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Crash(f"its process ended with {_told(self._process.exitcode)}")
        return answer

    def dismiss(self) -> None:
        """Let it end when it has nothing to do, and at once when it has."""
        self.connection.close()
        if self.job is not None:
            self._process.kill()

    def end(self) -> None:
        """Wait until it has ended, and end it if it does not."""
        self.connection.close()
        self._process.join(_PATIENCE_S)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, spec: WorkerSpec) -> None:
    """What a worker's process does, until there is nobody to work for."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    attempts = Attempts(spec)
    answer: Answer | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while not isinstance(answer, Crash):
            answer = attempts.run(connection.recv())
            connection.send(answer)
    # What has failed may also fail to be freed; the end of the process does it.
    if not isinstance(answer, Crash):
        attempts.close()


def _end_with_parent() -> None:
    """Not even the episode at hand is finished for a parent that is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _told(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {-exitcode}"
    return f"exit code {exitcode}"
