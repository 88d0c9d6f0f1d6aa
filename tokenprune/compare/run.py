"""Runs one pipeline over a recorded episode: what each query did, and its actions."""

from __future__ import annotations

from collections.abc import Callable

from tokenprune.compare.episode import Episode
from tokenprune.compare.replay import Tick, query_steps, replay
from tokenprune.engine.adapter import Backbone
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.report.describe import UNTRAINED, describe, describe_layout
from tokenprune.report.provenance import provenance
from tokenprune.report.record import QueriedEpisode
from tokenprune.report.result import RunQuery, RunResult, RunSettings


def run(
    backbone: Backbone,
    pipeline: LoadedPipeline,
    episode: Episode,
    registry: Registry,
    queries: int | None = None,
    settings: RunSettings | None = None,
    begin: Callable[[int], Tick] = lambda total: lambda: None,
    execution: str = "eager",
) -> RunResult:
    """Replay an episode to one pipeline, and return what the result file holds.

    Args:
        backbone: What the pipeline runs on.
        pipeline: What to run.
        episode: The recorded episode to replay.
        registry: Discovered plugins.
        queries: How many queries, from the start; all when left out.
        settings: Written to the result.
        begin: Called with the number of queries to come; what it returns is called after each.
        execution: How plans are executed.

    Raises:
        EpisodeError: If the episode has fewer queries, or lacks a view.
        TraceError: If a query did not run to plan.
    """
    policy = Policy(backbone, pipeline.config, registry, execution)
    steps = query_steps(episode, backbone.info.action.horizon, queries)
    (chunks,) = replay([policy], episode, steps, begin(len(steps)))
    stages = zip(policy.pipeline.names, policy.pipeline.stages, strict=True)
    findings = {name: dict(stage.findings()) for name, stage in stages}
    return RunResult(
        provenance=provenance(backbone.device),
        settings=settings,
        backbone=describe(backbone),
        note=UNTRAINED if backbone.info.untrained else "",
        episode=QueriedEpisode(name=episode.name, instruction=episode.instruction, steps=steps),
        layout=describe_layout(chunks[0].trace.plan.layout),
        pipeline=pipeline.resolved,
        queries=[
            RunQuery.model_validate(chunk.trace.to_json(with_ids=True) | {"actions": chunk.actions.tolist()})
            for chunk in chunks
        ],
        findings={name: found for name, found in findings.items() if found},
    )
