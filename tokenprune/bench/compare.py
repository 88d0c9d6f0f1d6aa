"""Several pipelines against the dense policy, on the same observations, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenprune.adapter import Backbone
from tokenprune.backbone import BackboneInfo
from tokenprune.bench.provenance import provenance
from tokenprune.bench.replay import Tick, query_steps, replay
from tokenprune.config import DENSE
from tokenprune.episode import Episode
from tokenprune.errors import ConfigError
from tokenprune.flops import Probed, QueryFlops, query_flops
from tokenprune.layout import TokenLayout
from tokenprune.loader import LoadedPipeline
from tokenprune.policy import ActionChunk, Policy
from tokenprune.registry import Registry
from tokenprune.trace import QueryTrace

Array = np.ndarray[Any, np.dtype[np.float64]]
FORMAT_VERSION = 1
WARMUP = 2
UNTRAINED = (
    "The weights are untrained random numbers: action error says how far pruning\n"
    "moves the output, and nothing about success."
)


@dataclass(frozen=True)
class Gain:
    """What pruning gained: median speedup query by query, FLOP ratio, and the first over the second."""

    speedup: float
    flop_ratio: float
    efficiency: float


@dataclass(frozen=True)
class Row:
    """One pipeline's line in the table.

    Attributes:
        pipeline: Its label.
        tokens_mean: Visual tokens held, mean over layers and queries.
        tokens_last: Visual tokens the last layer holds, mean over queries.
        gflops: Per query, the whole policy.
        flop_ratio: Dense FLOPs over its own.
        median_ms: Whole query, observation to actions.
        p95_ms: Likewise.
        speedup: Median over queries of dense time over its own, query by query; where a controller answered some in
            place of the model, all of dense time over all of its own.
        efficiency: Speedup over FLOP ratio: how much of the saved arithmetic became saved time.
        selection: Time spent choosing, moving and remembering tokens, as a share of the dense query.
        phases: Median milliseconds of each phase of a query.
        prefill: The decoder over the layout's tokens, choosing among them included, beside dense.
        error: Mean absolute difference from the dense actions per group of dimensions, in the environment's units.
        gripper_flips: Actions whose gripper command differs from dense.
        actions: Actions compared.
        fallbacks: Queries that ran dense because a stage failed.
        replayed: Queries that a controller answered in place of the model.
    """

    pipeline: str
    tokens_mean: float
    tokens_last: float
    gflops: float
    flop_ratio: float
    median_ms: float
    p95_ms: float
    speedup: float
    efficiency: float
    selection: float
    phases: dict[str, float]
    prefill: Gain
    error: dict[str, float]
    gripper_flips: int
    actions: int
    fallbacks: int
    replayed: int


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


def make_row(label: str, own: Sequence[ActionChunk], dense: Sequence[ActionChunk], info: BackboneInfo) -> Row:
    """Summarise one pipeline's queries beside the dense ones at the same steps."""
    traces = [chunk.trace for chunk in own]
    times = np.array([trace.milliseconds for trace in traces])
    baseline = np.array([chunk.trace.milliseconds for chunk in dense])
    spent, spent_dense = ([trace_flops(info, c.trace) for c in chunks] for chunks in (own, dense))
    flops = np.mean([f.total for f in spent])
    replayed = sum(trace.replayed for trace in traces)
    whole = _gain(times, baseline, [f.total for f in spent], [f.total for f in spent_dense], replayed > 0)
    prefill = _gain(
        np.array([_prefill(trace) for trace in traces]),
        np.array([_prefill(chunk.trace) for chunk in dense]),
        [f.decoder + f.probe for f in spent],
        [f.decoder + f.probe for f in spent_dense],
        replayed > 0,
    )
    pairs = np.stack([chunk.actions for chunk in own]), np.stack([chunk.actions for chunk in dense])
    distance = np.abs(pairs[0] - pairs[1])
    phases = dict.fromkeys(name for trace in traces for name in trace.phases)
    flips = 0
    if info.action.gripper is not None:
        dim, threshold = info.action.gripper
        flips = int(((pairs[0][..., dim] > threshold) != (pairs[1][..., dim] > threshold)).sum())
    return Row(
        pipeline=label,
        tokens_mean=float(np.mean([np.mean(trace.plan.prunable) for trace in traces])),
        tokens_last=float(np.mean([trace.plan.prunable[-1] for trace in traces])),
        gflops=float(flops / 1e9),
        flop_ratio=whole.flop_ratio,
        median_ms=float(np.median(times)),
        p95_ms=float(np.percentile(times, 95)),
        speedup=whole.speedup,
        efficiency=whole.efficiency,
        selection=float(np.median([_own_work(trace) for trace in traces]) / np.median(baseline)),
        phases={name: float(np.median([t.phases.get(name, 0.0) for t in traces])) for name in phases},
        prefill=prefill,
        error={name: float(distance[..., list(dims)].mean()) for name, dims in info.action.groups.items()},
        gripper_flips=flips,
        actions=int(pairs[0].shape[0] * pairs[0].shape[1]),
        fallbacks=sum(bool(trace.fallback) for trace in traces),
        replayed=replayed,
    )


def _gain(
    own: Array, dense: Array, own_flops: Sequence[int], dense_flops: Sequence[int], of_sums: bool = False
) -> Gain:
    speedup = float(dense.sum() / own.sum() if of_sums else np.median(dense / own))
    flop_ratio = float(np.mean(dense_flops) / np.mean(own_flops))
    return Gain(speedup, flop_ratio, speedup / flop_ratio)


def _prefill(trace: QueryTrace) -> float:
    return trace.phases.get("decoder", 0.0) + trace.phases.get("selection", 0.0)


def _own_work(trace: QueryTrace) -> float:
    return trace.phases.get("selection", 0.0) + trace.phases.get("history", 0.0)


def trace_flops(info: BackboneInfo, trace: QueryTrace) -> QueryFlops:
    """FLOPs of a query as it ran, attention probes included; none where a controller answered."""
    if trace.replayed:
        return QueryFlops(other={}, layers=(0,) * trace.plan.depth, follow_up=0, probe=0)
    probes = [Probed(probe.layer, probe.count, probe.ahead, probe.behind) for probe in trace.probes]
    return query_flops(info, trace.plan, probes, trace.encoder)


def describe(backbone: Backbone) -> dict[str, Any]:
    """The backbone as plain data."""
    info = backbone.info
    return {
        "name": info.name,
        "source": info.source,
        "untrained": info.untrained,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "decoder": asdict(info.decoder),
        "views": list(info.views),
        "action": asdict(info.action),
        "capabilities": sorted(info.capabilities),
    }


def describe_layout(layout: TokenLayout) -> dict[str, Any]:
    """The tokens of a query as plain data."""
    return {"segments": [asdict(segment) for segment in layout.segments]}


def notes(policy: Policy) -> list[str]:
    """What each stage says of itself on this backbone."""
    bound = policy.pipeline
    said = [(name, stage.notes(bound.info)) for name, stage in zip(bound.names, bound.stages, strict=True)]
    return [f"{name}: {text}" for name, text in said if text]
