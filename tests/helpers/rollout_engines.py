"""What the tests of the engines share: a small evaluation of the toy, and what it comes to in one process."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

from tests.helpers import toy_environment as toy
from tokenprune.evaluation.jobs import plan_jobs
from tokenprune.evaluation.starts import plan_starts
from tokenprune.evaluation.variant import parse_variant
from tokenprune.evaluation.worker import Worker, WorkerSpec
from tokenprune.registry.discovery import Registry

PLUGIN = Path(toy.__file__)
LABELS = ("dense", "fastv@keep=0.25", "dense+no-wrist")


def evaluation(*labels, device="cpu", **options):
    """A worker's specification and the jobs of two tasks with three starts each."""
    registry = Registry.discover(plugin_files=[PLUGIN])
    variants = tuple(parse_variant(label, registry) for label in labels or LABELS)
    starts = plan_starts(toy.Factory.describe("toy", {}), ["0", "1"], 3)
    spec = WorkerSpec(
        "toy-policy", None, "tiny", {}, device, "float32", 0, variants, {"toy": options}, {"toy": (0, 1)},
        plugins=(str(PLUGIN),),
    )  # fmt: skip
    return spec, plan_jobs(starts, [variant.label for variant in variants])


def same(record):
    """What is to be the same whatever ran the episode."""
    return {name: value for name, value in asdict(record).items() if not name.endswith(("_s", "_ms"))}


@cache
def expected():
    """The records of the evaluation, by start and variant."""
    spec, jobs = evaluation()
    worker = Worker(spec)
    return {job: same(worker.run(job)) for job in jobs}


def by_job(records, jobs):
    """Records as `expected` has them, their crashes apart."""
    records = list(records)
    assert len(records) == len(jobs)
    found = {(record.start, record.variant): same(record) for record in records}
    crashes = {job: found[job.start, job.variant]["crashes"] for job in jobs}
    plain = {job: found[job.start, job.variant] | {"crashes": 0} for job in jobs}
    return plain, {job: count for job, count in crashes.items() if count}
