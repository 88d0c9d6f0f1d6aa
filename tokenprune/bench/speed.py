"""How fast pipelines are at real size, on backbones, in dtypes and execution modes, each beside its dense policy."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenprune.bench.memory import Gauged
from tokenprune.bench.roofline import Roof, measure_roof
from tokenprune.bench.row import Asked, curve, dense_row, speed_row
from tokenprune.bench.upstream import UPSTREAM, UpstreamBackbone
from tokenprune.compare.comparison import beside_dense
from tokenprune.compare.episode import Episode
from tokenprune.compare.replay import Tick, check_views, query_steps, replay
from tokenprune.engine.adapter import Backbone
from tokenprune.engine.executor import Execution, check_plan
from tokenprune.errors import CapabilityError, ConfigError, LayoutError, nearest
from tokenprune.loading import load_backbone
from tokenprune.model.device import DTYPES
from tokenprune.pipelines.binding import bind
from tokenprune.pipelines.config import DENSE, PipelineConfig
from tokenprune.pipelines.loader import LoadedPipeline
from tokenprune.registry.discovery import Registry
from tokenprune.report.describe import describe, describe_layout, notes
from tokenprune.report.provenance import provenance

REFERENCES = ("upstream",)
"""Other ways to run the dense policy, measured beside it."""


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """A backbone's name and preset, and the episode it looks at."""

    backbone: str
    preset: str
    episode: Episode


@dataclass(frozen=True)
class BenchSettings:
    """What is measured besides the pipelines, and how.

    Attributes:
        dtypes: Names from `backbones.DTYPES`, or `auto`.
        modes: Names of `Execution`.
        device: torch device.
        pairs: Queries per pipeline, each with a dense one beside it.
        warmup: Such pairs that come before them and are not counted.
        queries: How many queries from the episode's start are asked over and over; all when None.
        reference: A name from `REFERENCES`, or None.
        profile: Folder for torch profiler traces, None for none.
        seed: Seed of random weights.
        options: The backbones' own.
    """

    dtypes: tuple[str, ...] = ("auto",)
    modes: tuple[str, ...] = (Execution.EAGER,)
    device: str = "cpu"
    pairs: int = 10
    warmup: int = 2
    queries: int | None = None
    reference: str | None = None
    profile: Path | None = None
    seed: int = 0
    options: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: Naming the setting, what it is and what it could be.
        """
        named = [("mode", self.modes, tuple(Execution)), ("dtype", self.dtypes, (*DTYPES, "auto"))]
        named += [("reference", () if self.reference is None else (self.reference,), REFERENCES)]
        for what, given, valid in named:
            for name in given:
                if name not in valid:
                    raise ConfigError(f"unknown {what} '{name}'{nearest(name, valid)}")
        graphs = [mode for mode in self.modes if mode.endswith("cuda_graph")]
        if graphs and not self.device.startswith("cuda"):
            raise ConfigError(f"mode '{graphs[0]}' needs a CUDA device, got '{self.device}'")
        for what, number in (("pairs", self.pairs), ("warmup", self.warmup)):
            if number < 1:
                raise ConfigError(f"{what} must be 1 or more, got {number}")


@dataclass(frozen=True)
class _Case:
    """One backbone, made."""

    subject: Subject
    backbone: Backbone
    mode: str
    measure_roof: Callable[[], Roof]
    steps: tuple[int, ...]


def bench(
    subjects: Sequence[Subject],
    pipelines: Sequence[LoadedPipeline],
    settings: BenchSettings,
    registry: Registry,
    save: Callable[[dict[str, Any]], None] = lambda data: None,
    begin: Callable[[int], Tick] = lambda total: lambda: None,
    roof: Callable[[torch.device, torch.dtype], Roof] = measure_roof,
) -> dict[str, Any]:
    """Measure every pipeline on every backbone in every dtype and mode.

    Each pipeline has dense queries of its own: it and the dense policy are asked in turn at the same observations, so a
    machine whose speed drifts is as fast for both. What a backbone cannot run is left out there and named.

    Args:
        subjects: Backbones.
        pipelines: What to measure; the dense policy is always there.
        settings: What else.
        registry: Discovered plugins.
        save: Called with the result so far after each pipeline, so that an interrupted run leaves what it has.
        begin: Called with the number of queries to come; what it returns is called after each.
        roof: Measures the device.

    Returns:
        What the result file holds.

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
    data: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "bench",
        "complete": False,
        "provenance": {},
        "settings": {**asdict(settings), "profile": None if settings.profile is None else str(settings.profile)},
        "pipelines": {p.label: p.resolved for p in others},
        "refused": refused,
        "results": [],
    }
    for subject, by_mode in zip(subjects, fitting, strict=True):
        for dtype in settings.dtypes:
            backbone = _load(subject, settings, dtype, registry)
            data["provenance"] = data["provenance"] or provenance(backbone.device)
            measure = partial(roof, backbone.device, backbone.dtype)
            steps = tuple(query_steps(subject.episode, backbone.info.action.horizon, settings.queries))
            for mode in settings.modes:
                case = _Case(subject, backbone, mode, measure, steps)
                for result in _measure(case, by_mode[mode], settings, registry, tick):
                    data["results"] = [*(r for r in data["results"] if r["key"] != result["key"]), result]
                    save(data)
            del backbone, case
            _release()
    data["complete"] = True
    save(data)
    return data


def _fitting(
    subjects: Sequence[Subject], pipelines: Sequence[LoadedPipeline], settings: BenchSettings, registry: Registry
) -> tuple[list[dict[str, list[LoadedPipeline]]], list[dict[str, str]]]:
    """Pipelines that each backbone can run in each mode, and the others with the reason; found out without weights."""
    fitting, refused = [], []
    for subject in subjects:
        factory = registry.backbone_factory(subject.backbone)
        described = factory.describe(subject.preset, None, settings.options or {})
        info, layout = described.info, described.layout(subject.episode.instruction)
        query_steps(subject.episode, info.action.horizon, settings.queries)
        kept: dict[str, list[LoadedPipeline]] = {mode: [] for mode in settings.modes}
        check_views(subject.episode, info.views)
        for pipeline in pipelines:
            for mode, those in kept.items():
                try:
                    bound = bind(pipeline.config, info, registry)
                    for own in pipeline.config.modes:
                        check_plan(Execution(mode), bound, bound.plan(layout, own))
                except (CapabilityError, ConfigError, LayoutError) as error:
                    entry = {"backbone": subject.backbone, "pipeline": pipeline.label, "why": str(error)}
                    refused += [] if entry in refused else [entry]
                else:
                    those.append(pipeline)
        if not any(kept.values()) and settings.reference is None:
            why = "; ".join(entry["why"] for entry in refused if entry["backbone"] == subject.backbone)
            raise ConfigError(f"nothing to measure on '{subject.backbone}': {why or 'name a pipeline besides dense'}")
        fitting.append(kept)
    return fitting, refused


def _load(subject: Subject, settings: BenchSettings, dtype: str, registry: Registry) -> Backbone:
    options = settings.options or {}
    return load_backbone(
        subject.backbone, registry, None, subject.preset, settings.device, dtype, settings.seed, options
    )


def _release() -> None:
    """Give the memory of one backbone back before the next is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _policy(backbone: Backbone, config: PipelineConfig, registry: Registry, mode: str) -> Gauged:
    """A policy that executes its plans in a mode."""
    return Gauged(backbone, config, registry, mode)


def _measure(
    case: _Case, pipelines: Sequence[LoadedPipeline], settings: BenchSettings, registry: Registry, tick: Tick
) -> Iterator[dict[str, Any]]:
    """The result of one backbone, dtype and mode, after each of its pipelines."""
    backbone, info = case.backbone, case.backbone.info
    itemsize = backbone.dtype.itemsize
    entrants = [(p.label, p.config) for p in pipelines]
    entrants += [] if settings.reference is None else [(UPSTREAM, DENSE)]
    dense = _policy(backbone, DENSE, registry, case.mode)
    roof, said, pairs = case.measure_roof(), {}, {}
    for label, config in entrants:
        if label == UPSTREAM:
            own = _policy(UpstreamBackbone(backbone), config, registry, Execution.EAGER)
        else:
            own = _policy(backbone, config, registry, case.mode)
        pairs[label] = beside, asked = _pairs(dense, own, case, settings, tick)
        # Other work on the machine may have come between, and so once is not enough to know what it can do.
        roof = roof.best(case.measure_roof())
        said[label] = {"notes": notes(own), "last_query": asked.chunks[-1].trace.to_json()}
        if settings.profile is not None:
            _profile(own, case, settings.profile / f"{'-'.join(_key(case))}-{_file_name(label)}.json")
        layout = beside.chunks[0].trace.plan.layout
        rows = [dense_row([beside for beside, _ in pairs.values()], info, roof, itemsize)]
        rows += [speed_row(name, asked, beside, info, roof, itemsize) for name, (beside, asked) in pairs.items()]
        yield {
            "key": _key(case),
            "backbone": describe(backbone),
            "preset": case.subject.preset,
            "dtype": _name(backbone.dtype),
            "mode": case.mode,
            "episode": _told(case),
            "layout": describe_layout(layout),
            "follow_up": None if info.follow_up is None else info.follow_up.phase,
            "roof": asdict(roof),
            "curve": curve(info, layout, roof, itemsize),
            "rows": [row.to_json() for row in rows],
            "pipelines": dict(said),
        }


def _pairs(dense: Gauged, own: Gauged, case: _Case, settings: BenchSettings, tick: Tick) -> tuple[Asked, Asked]:
    """Ask the dense policy and another one in turn; first to warm up, then to measure."""
    policies = (dense, own)
    for policy in policies:
        policy.counting = True
    _ask(policies, case, settings.warmup, tick)
    for policy in policies:
        policy.counting = False
        policy.peaks.clear()
    answers = _ask(policies, case, settings.pairs, tick)
    beside, asked = (
        Asked(tuple(chunks), tuple(policy.peaks), policy.waits)
        for policy, chunks in zip(policies, answers, strict=True)
    )
    return beside, asked


def _ask(policies: Sequence[Gauged], case: _Case, count: int, tick: Tick) -> list[list[Any]]:
    """That many answers of each policy, from the episode played as often as that needs."""
    answers: list[list[Any]] = [[] for _ in policies]
    while count:
        steps = case.steps[:count]
        for one, more in zip(answers, replay(policies, case.subject.episode, steps, tick), strict=True):
            one += more
        count -= len(steps)
    return answers


def _profile(policy: Gauged, case: _Case, path: Path) -> None:
    """Write a torch profiler trace of the first two queries of the episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as seen:
        replay([policy], case.subject.episode, case.steps[:2])
    seen.export_chrome_trace(str(path))


def _key(case: _Case) -> tuple[str, str, str, str]:
    return case.subject.backbone, case.subject.preset, _name(case.backbone.dtype), case.mode


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in label)


def _told(case: _Case) -> dict[str, Any]:
    episode = case.subject.episode
    return {"name": episode.name, "instruction": episode.instruction, "steps": list(case.steps)}
