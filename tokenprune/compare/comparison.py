"""Compares pipelines with the dense policy on the same observations, queried in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenprune.compare.episode import Episode
from tokenprune.compare.replay import Tick, query_steps, replay
from tokenprune.compare.row import make_row
from tokenprune.engine.adapter import Backbone
from tokenprune.errors import ConfigError
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.report.describe import UNTRAINED, describe, describe_layout, notes
from tokenprune.report.provenance import provenance
from tokenprune.report.record import TraceWithIds
from tokenprune.report.result import ComparedEpisode, CompareResult, RunSettings

WARMUP = 2
"""Queries of each policy before the measured ones."""


def compare(
    backbone: Backbone,
    pipelines: Sequence[LoadedPipeline],
    episode: Episode,
    registry: Registry,
    queries: int | None = None,
    settings: RunSettings | None = None,
    begin: Callable[[int], Tick] = lambda total: lambda: None,
    execution: str = "eager",
) -> CompareResult:
    """Replay an episode to the dense policy and to every pipeline, and return what the result file holds.

    The dense policy is the same loop with no stages. It is queried in turn with the others, so each query of each
    pipeline has a dense query beside it. Queries before the measured ones warm up caches and kernels.

    Args:
        backbone: Shared by all.
        pipelines: What to compare; `dense` among them is the baseline itself.
        episode: The recorded episode to replay.
        registry: Discovered plugins.
        queries: How many queries, from the start; all when left out.
        settings: Written to the result.
        begin: Called with the number of queries to come; what it returns is called after each.
        execution: How plans are executed, the dense policy's too.

    Raises:
        ConfigError: If two pipelines have the same name.
        TraceError: If a query did not run to plan.
    """
    others = beside_dense(pipelines)
    labels = ["dense", *(p.label for p in others)]
    policies = [Policy(backbone, config, registry, execution) for config in (DENSE, *(p.config for p in others))]
    steps = query_steps(episode, backbone.info.action.horizon, queries)
    warmup = steps[: min(WARMUP, len(steps))]
    tick = begin(len(policies) * (len(steps) + len(warmup)))
    replay(policies, episode, warmup, tick)
    chunks = dict(zip(labels, replay(policies, episode, steps, tick), strict=True))
    return CompareResult(
        provenance=provenance(backbone.device),
        settings=settings,
        backbone=describe(backbone),
        note=UNTRAINED if backbone.info.untrained else "",
        episode=ComparedEpisode(
            name=episode.name, instruction=episode.instruction, steps=steps, meta=dict(episode.meta)
        ),
        layout=describe_layout(chunks["dense"][0].trace.plan.layout),
        warmup_queries=len(warmup),
        pipelines={"dense": {"version": 1, "name": "dense"}, **{p.label: p.resolved for p in others}},
        notes={label: notes(policy) for label, policy in zip(labels, policies, strict=True)},
        rows=[make_row(label, own, chunks["dense"], backbone.info) for label, own in chunks.items()],
        queries={
            label: [TraceWithIds.model_validate(chunk.trace.to_json(with_ids=True)) for chunk in own]
            for label, own in chunks.items()
        },
    )


def beside_dense(pipelines: Sequence[LoadedPipeline]) -> list[LoadedPipeline]:
    """Return the pipelines without `dense`, which is always measured.

    Raises:
        ConfigError: If two have the same name.
    """
    others = [p for p in pipelines if p.label != "dense"]
    labels = [p.label for p in others]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"two pipelines are called '{label}'; rename one, or write '{label}@keep=0.25' to vary it"
            )
    return others
