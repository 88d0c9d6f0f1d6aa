"""One evaluation: checked before anything runs, then run into a results file, which an interrupted one continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenprune.evaluation.engines import Engine
from tokenprune.evaluation.jobs import Job, plan_jobs
from tokenprune.evaluation.planning import EpisodePlan
from tokenprune.evaluation.records import EpisodeRecord
from tokenprune.evaluation.results_file import Results, ResultsFile
from tokenprune.evaluation.variant import black_views
from tokenprune.evaluation.worker import WorkerSpec
from tokenprune.loading import describe_backbone
from tokenprune.registry.discovery import Registry
from tokenprune.report.provenance import provenance

OnRecord = Callable[[EpisodeRecord], None]

Begin = Callable[[int, Sequence[EpisodeRecord]], OnRecord]
"""Called with the number of episodes and the records that exist; what it returns is called with each new record."""


@dataclass(frozen=True)
class Session:
    """An evaluation that is ready to run; made by `open_session`.

    Attributes:
        spec: What each worker needs.
        plan: The episodes.
        settings: Everything that changes results, but the variants: the header of the results file.
        variants: What makes up each variant, by label: its line in the results file.
    """

    spec: WorkerSpec
    plan: EpisodePlan
    settings: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]

    def run(self, engine: Engine, path: Path, begin: Begin = lambda total, finished: lambda record: None) -> Results:
        """Run the episodes that the results file does not hold yet.

        Args:
            engine: Where they run.
            path: The results file; created, or continued where its settings are the same.
            begin: Called before the first episode.

        Returns:
            What the file holds at the end.

        Raises:
            ResultError: If the file is damaged, or holds results of other settings.
            RolloutError: If someone else writes to the file, an episode crashes three times, or a worker cannot go on.
            TokenPruneError: What a worker raised.
        """
        with ResultsFile(path, self.settings, provenance(torch.device(self.spec.device))) as file:
            for label, description in self.variants.items():
                file.declare(label, description)
            jobs = plan_jobs(self.plan.starts, list(self.variants))
            finished = {Job(record.start, record.variant): record for record in file.results.records}
            on_record = begin(len(jobs), [finished[job] for job in jobs if job in finished])
            for record in engine.run(self.spec, [job for job in jobs if job not in finished]):
                file.append(record)
                on_record(record)
            return file.results


def open_session(spec: WorkerSpec, plan: EpisodePlan, registry: Registry) -> Session:
    """Check an evaluation without weights and without a simulator, and describe it for its results file.

    Args:
        spec: What each worker needs.
        plan: The episodes.
        registry: Discovered plugins.

    Raises:
        PluginError: If the backbone is unknown.
        ConfigError: If an option or a variant's condition is wrong, or videos are wanted and cannot be written.
        CheckpointError: If the checkpoint cannot be used.
    """
    if spec.videos is not None:
        from tokenprune.evaluation.video import imageio

        imageio()
    policy = describe_backbone(spec.backbone, registry, spec.checkpoint, spec.preset, spec.options)
    variants = {variant.label: spec.describe(variant, plan.suites) for variant in spec.variants}
    for variant in spec.variants:
        black_views(variant, policy.info.views)
    settings = {**spec.settings(plan.suites, policy.weights), "untrained": policy.info.untrained}
    return Session(spec, plan, settings, variants)
