"""Measures pipelines at real size, on backbones, in dtypes and execution modes, each beside its dense policy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tokenprune.bench.memory import MeteredPolicy
from tokenprune.bench.result import BenchResult, CaseKey, CaseResult, PipelineTrace, Refusal
from tokenprune.bench.roofline import Roof, measure_roof
from tokenprune.bench.row import MeteredQueries, curve, dense_row, speed_row
from tokenprune.bench.settings import BenchSettings
from tokenprune.bench.upstream import UPSTREAM, UpstreamBackbone
from tokenprune.compare.comparison import beside_dense
from tokenprune.compare.episode import Episode
from tokenprune.compare.replay import Tick, check_views, query_steps, replay
from tokenprune.engine.adapter import Backbone
from tokenprune.engine.executor import Execution, check_plan
from tokenprune.errors import CapabilityError, ConfigError, LayoutError
from tokenprune.loading import load_backbone
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.config import DENSE
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.policy import ActionChunk
from tokenprune.registry.discovery import Registry
from tokenprune.report.describe import describe, describe_layout, notes
from tokenprune.report.provenance import provenance
from tokenprune.report.record import QueriedEpisode, TraceRecord


@dataclass(frozen=True)
class Subject:
    """A backbone's name and preset, and the episode that it replays."""

    backbone: str
    preset: str
    episode: Episode


@dataclass(frozen=True)
class _Case:
    """One loaded backbone in one execution mode."""

    subject: Subject
    backbone: Backbone
    mode: str
    measure_roof: Callable[[], Roof]
    steps: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Name of the dtype."""
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def key(self) -> CaseKey:
        """What tells it from other cases."""
        return self.subject.backbone, self.subject.preset, self.dtype, self.mode


def bench(
    subjects: Sequence[Subject],
    pipelines: Sequence[LoadedPipeline],
    settings: BenchSettings,
    registry: Registry,
    save: Callable[[BenchResult], None] = lambda result: None,
    begin: Callable[[int], Tick] = lambda total: lambda: None,
    roof: Callable[[torch.device, torch.dtype], Roof] = measure_roof,
) -> BenchResult:
    """Measure every pipeline on every backbone in every dtype and mode, and return what the result file holds.

    Each pipeline has dense queries of its own: it and the dense policy are queried in turn at the same observations, so
    a drift of the machine's speed meets both. Pipelines that a backbone cannot run are left out there and named.

    Args:
        subjects: Backbones.
        pipelines: What to measure; the dense policy is always there.
        settings: What else.
        registry: Discovered plugins.
        save: Called with the result so far after each pipeline, so that an interrupted run keeps what it has.
        begin: Called with the number of queries to come; what it returns is called after each.
        roof: Measures the device.

    Raises:
        ConfigError: If a setting is wrong, or no pipeline runs on a backbone; before any weights are made.
        EpisodeError: If an episode has fewer queries than asked for, or lacks a view; before any weights are made.
        TraceError: If a query did not run to plan.
    """
    settings.check()
    others = beside_dense(pipelines)
    fitting, refused = _fitting(subjects, others, settings, registry)
    blocks = sum(len(kept) + (settings.reference is not None) for by_mode in fitting for kept in by_mode.values())
    tick = begin(2 * len(settings.dtypes) * blocks * (settings.pairs + settings.warmup))
    result: BenchResult | None = None
    for subject, by_mode in zip(subjects, fitting, strict=True):
        for dtype in settings.dtypes:
            backbone = _load(subject, settings, dtype, registry)
            result = result or BenchResult(
                complete=False,
                provenance=provenance(backbone.device),
                settings=settings,
                pipelines={p.label: p.resolved for p in others},
                refused=refused,
                results=[],
            )
            measure = partial(roof, backbone.device, backbone.dtype)
            steps = tuple(query_steps(subject.episode, backbone.info.action.horizon, settings.queries))
            for mode in settings.modes:
                case = _Case(subject, backbone, mode, measure, steps)
                for measured in _measure(case, by_mode[mode], settings, registry, tick):
                    finished = [other for other in result.results if other.key != measured.key]
                    result = result.model_copy(update={"results": [*finished, measured]})
                    save(result)
            del backbone, case
            _release()
    if result is None:
        raise ConfigError("nothing to measure; name a backbone, a dtype and a mode")
    result = result.model_copy(update={"complete": True})
    save(result)
    return result


def _fitting(
    subjects: Sequence[Subject], pipelines: Sequence[LoadedPipeline], settings: BenchSettings, registry: Registry
) -> tuple[list[dict[str, list[LoadedPipeline]]], list[Refusal]]:
    """Return the pipelines that each backbone can run in each mode, and the refused ones; no weights are made."""
    fitting: list[dict[str, list[LoadedPipeline]]] = []
    refused: list[Refusal] = []
    for subject in subjects:
        factory = registry.backbone_factory(subject.backbone)
        described = factory.describe(subject.preset, None, settings.options or {})
        info, layout = described.info, described.layout(subject.episode.instruction)
        query_steps(subject.episode, info.action.horizon, settings.queries)
        kept: dict[str, list[LoadedPipeline]] = {mode: [] for mode in settings.modes}
        check_views(subject.episode, info.views)
        for pipeline in pipelines:
            for mode, runnable in kept.items():
                try:
                    bound = bind(pipeline.config, info, registry)
                    for token_mode in pipeline.config.modes:
                        check_plan(Execution(mode), bound, bound.plan(layout, token_mode))
                except (CapabilityError, ConfigError, LayoutError) as error:
                    refusal = Refusal(backbone=subject.backbone, pipeline=pipeline.label, why=str(error))
                    refused += [] if refusal in refused else [refusal]
                else:
                    runnable.append(pipeline)
        if not any(kept.values()) and settings.reference is None:
            why = "; ".join(refusal.why for refusal in refused if refusal.backbone == subject.backbone)
            raise ConfigError(f"nothing to measure on '{subject.backbone}': {why or 'name a pipeline besides dense'}")
        fitting.append(kept)
    return fitting, refused


def _load(subject: Subject, settings: BenchSettings, dtype: str, registry: Registry) -> Backbone:
    options = settings.options or {}
    return load_backbone(
        subject.backbone, registry, None, subject.preset, settings.device, dtype, settings.seed, options
    )


def _release() -> None:
    """Free the memory of one backbone before the next is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(
    case: _Case, pipelines: Sequence[LoadedPipeline], settings: BenchSettings, registry: Registry, tick: Tick
) -> Iterator[CaseResult]:
    """Yield the result of one backbone, dtype and mode after each of its pipelines."""
    backbone, info = case.backbone, case.backbone.info
    itemsize = backbone.dtype.itemsize
    dense = MeteredPolicy(backbone, DENSE, registry, case.mode)
    policies: dict[str, Callable[[], MeteredPolicy]] = {
        p.label: partial(MeteredPolicy, backbone, p.config, registry, case.mode) for p in pipelines
    }
    if settings.reference is not None:
        policies[UPSTREAM] = lambda: MeteredPolicy(UpstreamBackbone(backbone), DENSE, registry, Execution.EAGER)
    roof = case.measure_roof()
    traces: dict[str, PipelineTrace] = {}
    pairs: dict[str, tuple[MeteredQueries, MeteredQueries]] = {}
    for label, make in policies.items():
        policy = make()
        pairs[label] = beside, own = _pairs(dense, policy, case, settings, tick)
        # Other work on the machine may have come between, so one measurement does not show what the device can do.
        roof = roof.best(case.measure_roof())
        last = TraceRecord.model_validate(own.chunks[-1].trace.to_json())
        traces[label] = PipelineTrace(notes=notes(policy), last_query=last)
        if settings.profile is not None:
            _profile(policy, case, settings.profile / f"{'-'.join(case.key)}-{_file_name(label)}.json")
        layout = beside.chunks[0].trace.plan.layout
        rows = [dense_row([beside for beside, _ in pairs.values()], info, roof, itemsize)]
        rows += [speed_row(name, own, beside, info, roof, itemsize) for name, (beside, own) in pairs.items()]
        episode = case.subject.episode
        yield CaseResult(
            key=case.key,
            backbone=describe(backbone),
            preset=case.subject.preset,
            dtype=case.dtype,
            mode=case.mode,
            episode=QueriedEpisode(name=episode.name, instruction=episode.instruction, steps=list(case.steps)),
            layout=describe_layout(layout),
            follow_up=None if info.follow_up is None else info.follow_up.phase,
            roof=roof,
            curve=curve(info, layout, roof, itemsize),
            rows=rows,
            pipelines=dict(traces),
        )


def _pairs(
    dense: MeteredPolicy, own: MeteredPolicy, case: _Case, settings: BenchSettings, tick: Tick
) -> tuple[MeteredQueries, MeteredQueries]:
    """Query the dense policy and another one in turn, warm-up first; return the measured queries of both."""
    policies = (dense, own)
    for policy in policies:
        policy.counting = True
    _query(policies, case, settings.warmup, tick)
    for policy in policies:
        policy.counting = False
        policy.peaks.clear()
    beside, measured = (
        MeteredQueries(tuple(chunks), tuple(policy.peaks), policy.waits)
        for policy, chunks in zip(policies, _query(policies, case, settings.pairs, tick), strict=True)
    )
    return beside, measured


def _query(policies: Sequence[MeteredPolicy], case: _Case, count: int, tick: Tick) -> list[list[ActionChunk]]:
    """Query each policy `count` times; the episode is replayed as often as that needs."""
    chunks: list[list[ActionChunk]] = [[] for _ in policies]
    while count:
        steps = case.steps[:count]
        for own, more in zip(chunks, replay(policies, case.subject.episode, steps, tick), strict=True):
            own += more
        count -= len(steps)
    return chunks


def _profile(policy: MeteredPolicy, case: _Case, path: Path) -> None:
    """Write a torch profiler trace of the first two queries of the episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        replay([policy], case.subject.episode, case.steps[:2])
    profiler.export_chrome_trace(str(path))


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in label)
