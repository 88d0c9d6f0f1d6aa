"""Several pipelines against the dense policy, on the same observations, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenprune.compare.episode import Episode
from tokenprune.compare.replay import Tick, query_steps, replay
from tokenprune.compare.row import Row, make_row
from tokenprune.engine.adapter import Backbone
from tokenprune.errors import ConfigError
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.policy import Policy
from tokenprune.registry.discovery import Registry
from tokenprune.report.describe import UNTRAINED, describe, describe_layout, notes
from tokenprune.report.provenance import provenance

FORMAT_VERSION = 1
WARMUP = 2


@dataclass(frozen=True)
class Comparison:
    """Rows, and everything needed to repeat or doubt them; `data` is what the result file holds."""

    rows: tuple[Row, ...]
    data: dict[str, Any]


def compare(
    backbone: Backbone,
    pipelines: Sequence[LoadedPipeline],
    episode: Episode,
    registry: Registry,
    queries: int | None = None,
    settings: dict[str, Any] | None = None,
    begin: Callable[[int], Tick] = lambda total: lambda: None,
    execution: str = "eager",
) -> Comparison:
    """Replay an episode to the dense policy and to every pipeline.

    The dense policy is the same loop with no stages, asked in turn with the others, so each query of each pipeline
    has a dense query beside it. Queries before the measured ones warm up caches and kernels.

    Args:
        backbone: Shared by all.
        pipelines: What to compare; `dense` among them is the baseline itself.
        episode: What is replayed.
        registry: Discovered plugins.
        queries: How many queries, from the start; all when left out.
        settings: Recorded in the result.
        begin: Called with the number of queries to come; what it returns is called after each.
        execution: How all of them run, the dense policy too.

    Raises:
        ConfigError: If two pipelines have the same name.
        TraceError: If a query did not run to plan.
    """
    others = beside_dense(pipelines)
    labels = ["dense", *(p.label for p in others)]
    policies = [Policy(backbone, config, registry, execution) for config in (DENSE, *(p.config for p in others))]
    steps = query_steps(episode, backbone.info.action.horizon, queries)
    warm = steps[: min(WARMUP, len(steps))]
    tick = begin(len(policies) * (len(steps) + len(warm)))
    replay(policies, episode, warm, tick)
    chunks = replay(policies, episode, steps, tick)
    rows = tuple(make_row(label, own, chunks[0], backbone.info) for label, own in zip(labels, chunks, strict=True))
    data = {
        "format_version": FORMAT_VERSION,
        "kind": "compare",
        "provenance": provenance(backbone.device),
        "settings": settings or {},
        "backbone": describe(backbone),
        "note": UNTRAINED if backbone.info.untrained else "",
        "episode": {
            "name": episode.name,
            "instruction": episode.instruction,
            "steps": list(steps),
            "meta": dict(episode.meta),
        },
        "layout": describe_layout(chunks[0][0].trace.plan.layout),
        "warmup_queries": len(warm),
        "pipelines": {"dense": {"version": 1, "name": "dense"}, **{p.label: p.resolved for p in others}},
        "notes": {label: notes(policy) for label, policy in zip(labels, policies, strict=True)},
        "rows": [asdict(row) for row in rows],
        "queries": {
            label: [c.trace.to_json(with_ids=True) for c in own] for label, own in zip(labels, chunks, strict=True)
        },
    }
    return Comparison(rows, data)


def beside_dense(pipelines: Sequence[LoadedPipeline]) -> list[LoadedPipeline]:
    """The pipelines that are to stand beside the dense policy, which is always there.

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
