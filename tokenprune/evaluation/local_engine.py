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
from tokenprune.evaluation.jobs import LIMIT_S, POLL_S, Crash, Job, JobQueue, Outcome, checked_limit, hung
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.worker import SafeWorker, WorkerSpec

_SPAWN = multiprocessing.get_context("spawn")
_EXIT_S = 10.0
"""Seconds that an idle worker has to release its simulator and exit; then it is killed."""


class LocalEngine:
    """Processes of this machine, each with a backbone and a simulator of its own."""

    def __init__(self, workers: int = 1, threads: int = 1, limit_s: float = LIMIT_S) -> None:
        """Set the engine up; `run` starts the processes.

        Args:
            workers: Processes.
            threads: torch threads of each.
            limit_s: Seconds after which an episode counts as hung.

        Raises:
            RolloutError: If `workers` or `threads` is less than 1, or `limit_s` is not positive.
        """
        if workers < 1 or threads < 1:
            raise RolloutError(f"at least 1 worker with 1 thread, not {workers} with {threads}")
        self.workers, self.threads, self.limit_s = workers, threads, checked_limit(limit_s)

    def run(self, spec: WorkerSpec, jobs: Sequence[Job]) -> Iterator[EpisodeRecord]:
        """Run episodes and yield their records as they end.

        A process that dies or hangs, or whose simulator fails, is replaced, and its episode runs again. No process is
        left behind, however the evaluation ends.

        Raises:
            RolloutError: If one episode crashes three times, or a worker cannot go on.
            TokenPruneError: The error that a worker raised.
        """
        spec, queue = replace(spec, threads=self.threads), JobQueue(jobs)
        crew: list[_Process] = []
        try:
            for _ in range(min(self.workers, len(jobs))):
                crew.append(_Process(spec))
                crew[-1].begin(queue.take(None))
            while busy := {process.connection: process for process in crew if process.job is not None}:
                ready = wait(list(busy), POLL_S)
                for connection, process in busy.items():
                    if connection in ready:
                        outcome = process.outcome()
                    elif monotonic() - process.since > self.limit_s:
                        outcome = hung(self.limit_s)
                    else:
                        continue
                    job = process.job
                    assert job is not None
                    if isinstance(outcome, Crash):
                        process.dismiss()
                        process.end()
                        crew.remove(process)
                    record = queue.settle(job, outcome)
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
    """The parent's handle of a worker's process."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Start the process."""
        self.job: Job | None = None
        self.since = monotonic()
        self.connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, spec), daemon=True)
        # Ctrl-C in a terminal reaches every process of the group, but only the parent should handle it, and children
        # inherit blocked signals. The resource tracker starts first, because its start unblocks the signal.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def begin(self, job: Job | None) -> None:
        """Send it a job; None makes it release its simulator and exit."""
        self.job, self.since = job, monotonic()
        if job is None:
            self.dismiss()
            return
        # A process that has died meanwhile shows in `outcome`.
        with suppress(BrokenPipeError):
            self.connection.send(job)

    def outcome(self) -> Outcome:
        """Return the outcome of the job."""
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return Crash(f"its process ended with {_exit_text(self._process.exitcode)}")
        return outcome

    def dismiss(self) -> None:
        """Let an idle process exit, and kill a busy one."""
        self.connection.close()
        if self.job is not None:
            self._process.kill()

    def end(self) -> None:
        """Wait until it has exited, and kill it if it does not."""
        self.connection.close()
        self._process.join(_EXIT_S)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, spec: WorkerSpec) -> None:
    """Run jobs in a worker's process until the parent closes the connection."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = SafeWorker(spec)
    outcome: Outcome | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while not isinstance(outcome, Crash):
            outcome = worker.run(connection.recv())
            connection.send(outcome)
    # A simulator that has failed may also fail to close; the exit of the process releases it.
    if not isinstance(outcome, Crash):
        worker.close()


def _end_with_parent() -> None:
    """Exit as soon as the parent is gone, in the middle of an episode too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _exit_text(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {-exitcode}"
    return f"exit code {exitcode}"
