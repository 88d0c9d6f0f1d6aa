"""Chooses where episodes run. Imports no torch until an engine is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from tokenprune.errors import ConfigError

if TYPE_CHECKING:
    from tokenprune.evaluation.jobs import Job
    from tokenprune.evaluation.records import EpisodeRecord
    from tokenprune.evaluation.worker import WorkerSpec


class EngineName(StrEnum):
    """Where episodes run."""

    local = "local"
    ray = "ray"


class Engine(Protocol):
    """Runs episodes in several workers."""

    def run(self, spec: WorkerSpec, jobs: Sequence[Job]) -> Iterator[EpisodeRecord]:
        """Run episodes; yields their records as they end.

        Raises:
            RolloutError: If one episode crashes three times, or a worker cannot go on.
            TokenPruneError: What a worker raised.
        """
        ...


def make_engine(
    name: EngineName,
    workers: int,
    threads: int,
    limit_s: float,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
) -> Engine:
    """Make an engine; nothing is started before its `run`.

    Args:
        name: Processes of this machine, or actors of a Ray cluster.
        workers: Episodes at the same time.
        threads: torch threads of each worker, and with Ray its CPUs.
        limit_s: Seconds after which an episode has hung.
        gpus_per_worker: With Ray, GPUs that each worker reserves.
        address: With Ray, `HOST:PORT` of a cluster; one is started when left out.

    Raises:
        ConfigError: If GPUs or an address are given for processes of this machine.
        RolloutError: If there is less than one worker or thread, or no time.
    """
    if name == EngineName.ray:
        from tokenprune.evaluation.ray_engine import RayEngine

        return RayEngine(workers, address, threads, gpus_per_worker, limit_s)
    if gpus_per_worker or address is not None:
        raise ConfigError("--gpus-per-worker and --address belong to --engine ray")
    from tokenprune.evaluation.local_engine import LocalEngine

    return LocalEngine(workers, threads, limit_s)
