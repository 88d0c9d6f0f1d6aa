"""Runs episodes on the machines of a Ray cluster."""

from __future__ import annotations

import importlib
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, NamedTuple

from tokenprune.errors import RolloutError
from tokenprune.evaluation.jobs import LIMIT_S, POLL_S, Crash, Job, JobQueue, Outcome, checked_limit, hung
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.worker import SafeWorker, WorkerSpec

CONNECT_S = 20.0
"""Seconds that an address has to answer; Ray itself would try for minutes and end the program."""

_ENVIRONMENT = {
    # No usage statistics.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers that reserve no GPU keep the devices they see, which Ray announces as its future default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# Ray's default on macOS and Windows: a cluster of one machine listens on its loopback address only. Ray reads it when
# it is imported.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"


class _Running(NamedTuple):
    """An actor, its job, and when the job began."""

    actor: Any
    job: Job
    since: float


class RayEngine:
    """Actors of a Ray cluster, each with a backbone and a simulator of its own.

    In a program that has initialised Ray itself, the actors run on the cluster that it has joined.
    """

    def __init__(
        self,
        workers: int = 1,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Set the engine up; `run` connects and starts the actors.

        Args:
            workers: Actors.
            address: `HOST:PORT` of a cluster, or `auto` for the one this machine belongs to; when left out, a cluster
                is started on this machine's loopback address and ended with the evaluation.
            cpus_per_worker: CPUs each reserves, and torch threads.
            gpus_per_worker: GPUs each reserves; 0.5 lets two share one.
            limit_s: Seconds after which an episode counts as hung.

        Raises:
            RolloutError: If `workers` is less than 1, or `limit_s` or a reservation is not positive.
        """
        if workers < 1 or cpus_per_worker <= 0 or gpus_per_worker < 0:
            raise RolloutError(
                f"at least 1 worker with some CPU and 0 or more GPUs, "
                f"not {workers} with {cpus_per_worker:g} and {gpus_per_worker:g}"
            )
        self.workers, self.address, self.limit_s = workers, address, checked_limit(limit_s)
        self.reserved = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}

    def run(self, spec: WorkerSpec, jobs: Sequence[Job]) -> Iterator[EpisodeRecord]:
        """Run episodes and yield their records as they end.

        An actor that dies or hangs, or whose simulator fails, is replaced, and its episode runs again. No actor is left
        behind, however the evaluation ends.

        Raises:
            RolloutError: If Ray is missing or does not answer, no machine has what a worker reserves, one episode
                crashes three times, or a worker cannot go on.
            TokenPruneError: The error that a worker raised.
        """
        ray = self._import()
        spec, queue = replace(spec, threads=max(1, int(self.reserved["CPU"]))), JobQueue(jobs)
        started = not ray.is_initialized()
        running: dict[Any, _Running] = {}
        try:
            if started:
                self._connect(ray)
            self._check_resources(ray)
            make = ray.remote(SafeWorker).options(num_cpus=self.reserved["CPU"], num_gpus=self.reserved["GPU"])
            for _ in range(min(self.workers, len(jobs))):
                actor, first = make.remote(spec), queue.take(None)
                assert first is not None
                running[actor.run.remote(first)] = _Running(actor, first, monotonic())
            while running:
                ready = ray.wait(list(running), timeout=POLL_S)[0]
                late = [of for of, episode in running.items() if monotonic() - episode.since > self.limit_s]
                if not (ready or late):
                    continue
                reference = (ready or late)[0]
                actor, job, _ = running.pop(reference)
                outcome = _outcome(ray, reference) if ready else hung(self.limit_s)
                following = None
                try:
                    record = queue.settle(job, outcome)
                    following = queue.take(job)
                finally:
                    if isinstance(outcome, Crash) or following is None:
                        ray.kill(actor)
                if following is not None:
                    actor = make.remote(spec) if isinstance(outcome, Crash) else actor
                    running[actor.run.remote(following)] = _Running(actor, following, monotonic())
                if record is not None:
                    yield record
        finally:
            for episode in running.values():
                ray.kill(episode.actor)
            if started:
                ray.shutdown()

    def _import(self) -> Any:  # noqa: ANN401 - ray is untyped in places, and optional
        for name, value in (_ENVIRONMENT | (_LOOPBACK if self.address is None else {})).items():
            os.environ.setdefault(name, value)
        try:
            return importlib.import_module("ray")
        except ImportError as error:
            raise RolloutError(f"Ray is missing: pip install 'tokenprune-vla[ray]' ({error})") from error

    def _connect(self, ray: Any) -> None:  # noqa: ANN401
        quiet: dict[str, Any] = {"ignore_reinit_error": True, "log_to_driver": False, "logging_level": "ERROR"}
        if self.address is not None:
            _probe(self.address)
            ray.init(address=self.address, **quiet)
            return
        cpus = max(os.cpu_count() or 1, math.ceil(self.workers * self.reserved["CPU"]))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)

    def _check_resources(self, ray: Any) -> None:  # noqa: ANN401
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(has.get(name, 0) >= n for name, n in self.reserved.items()) for has in machines):
            wanted = " and ".join(f"{n:g} {name}" for name, n in self.reserved.items())
            raise RolloutError(f"no machine of the Ray cluster has the {wanted} that one worker reserves")


def _outcome(ray: Any, reference: Any) -> Outcome:  # noqa: ANN401
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayActorError as error:
        return Crash(f"its actor died: {' '.join(str(error).split()):.400}")
    except ray.exceptions.RayError as error:
        return RolloutError(f"a worker of the Ray cluster failed: {error}")
    return outcome


def _probe(address: str) -> None:
    """Check soon whether a cluster answers.

    Raises:
        RolloutError: If it does not.
    """
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    try:
        if colon:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        # Ray has no option to give up sooner, but a process can be killed.
        words = [sys.executable, "-c", _PROBE, address]
        done = subprocess.run(words, capture_output=True, text=True, timeout=CONNECT_S, check=False)
    except (OSError, OverflowError, ValueError) as error:
        raise RolloutError(f"no Ray cluster answers at '{address}' (write HOST:PORT, or auto): {error}") from error
    except subprocess.TimeoutExpired as error:
        raise RolloutError(f"no Ray cluster answers at '{address}' within {CONNECT_S:g} seconds") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise RolloutError(f"no Ray cluster answers at '{address}': {reason}")
