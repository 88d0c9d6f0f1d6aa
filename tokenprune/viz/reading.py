"""Reads what `tokenprune run` and `tokenprune compare` wrote, as far as a picture needs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from tokenprune.errors import ResultError, nearest
from tokenprune.viz.result import Cut, QueryResult, Result, View, further_reasons, losses, reasons_kept

FORMAT_VERSION = 1


class _Segment(BaseModel):
    view: str | None
    start: int = Field(ge=0)
    length: int = Field(ge=0)
    grid: tuple[int, int] | None
    prunable: bool


class _Layout(BaseModel):
    segments: list[_Segment]


class _Settings(BaseModel):
    preset: str | None
    checkpoint: str | None
    options: dict[str, Any]
    episode: str


class _Action(BaseModel):
    horizon: int = Field(ge=1)
    groups: dict[str, tuple[int, ...]]


class _Backbone(BaseModel):
    name: str
    source: str
    untrained: bool
    action: _Action


class _Episode(BaseModel):
    name: str
    instruction: str
    steps: list[int] = Field(min_length=1)


class _Query(BaseModel):
    mode: str
    fallback: str
    tokens_held: tuple[int, ...] = Field(min_length=1)
    kept_ids: dict[str, list[list[int]]]
    reasons: dict[str, dict[str, list[list[int]]]] = {}
    looked_back: dict[str, list[int | None]] = {}


class _Pipeline(BaseModel):
    name: str
    modes: tuple[str, ...] = ()


class _Common(BaseModel):
    settings: _Settings
    backbone: _Backbone
    episode: _Episode
    layout: _Layout


class _Run(_Common):
    pipeline: _Pipeline
    queries: list[_Query]


class _Compare(_Common):
    pipelines: dict[str, _Pipeline]
    queries: dict[str, list[_Query]] = Field(min_length=1)


def read_result(path: Path, pipeline: str | None = None) -> Result:
    """Read one pipeline's part of a result file.

    Args:
        path: What `tokenprune run` or `tokenprune compare` wrote.
        pipeline: Label of the pipeline; of a comparison, the first that is not dense when left out.

    Raises:
        ResultError: If the file is missing, no such result, damaged, or has no such pipeline.
    """
    data, pipelines, queries = _validated(path, _load(path))
    if pipeline is None:
        pipeline = next((label for label in queries if label != "dense"), next(iter(queries)))
    if pipeline not in queries:
        raise ResultError(f"{path} has no pipeline '{pipeline}'{nearest(pipeline, queries)}")
    told, steps = queries[pipeline], data.episode.steps
    if len(told) != len(steps):
        raise ResultError(f"{path}: pipeline '{pipeline}' has {len(told)} queries, the episode {len(steps)} steps")
    views = tuple(View(s.view, s.start, s.length, s.grid, s.prunable) for s in data.layout.segments if s.view)
    for view in views:
        if view.grid and view.grid[0] * view.grid[1] != view.length:
            raise ResultError(f"{path}: grid {view.grid} of view '{view.name}' does not hold {view.length} tokens")
    prunable = [i for view in views if view.prunable for i in view.span]
    cuts = [_cuts(f"{path}: step {step}", query, prunable) for step, query in zip(steps, told, strict=True)]
    names = further_reasons({name for those in cuts for cut in those for name in cut.reasons})
    settings, backbone = data.settings, data.backbone
    n_tokens = sum(s.length for s in data.layout.segments)
    return Result(
        label=pipeline,
        backbone=backbone.name,
        source=backbone.source,
        untrained=backbone.untrained,
        preset=settings.preset,
        checkpoint=settings.checkpoint,
        options=settings.options,
        episode=data.episode.name,
        episode_path=None if settings.episode == "bundled" else Path(settings.episode),
        instruction=data.episode.instruction,
        horizon=backbone.action.horizon,
        translation=backbone.action.groups.get("translation", ()),
        views=views,
        n_tokens=n_tokens,
        n_fixed=n_tokens - len(prunable),
        modes=tuple(dict.fromkeys((*pipelines[pipeline].modes, *(query.mode for query in told)))),
        queries=tuple(
            _query(step, query, those, prunable, names) for step, query, those in zip(steps, told, cuts, strict=True)
        ),
    )


def _load(path: Path) -> dict[str, Any]:
    """A JSON object of a known kind and version."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultError(f"cannot open result {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not a result file, which `tokenprune run` writes: not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise ResultError(f"{path} is not a result file, which `tokenprune run` writes: it has no 'kind'")
    if data["kind"] not in ("run", "compare"):
        raise ResultError(f"{path} is a result of kind '{data['kind']}'{nearest(data['kind'], ('run', 'compare'))}")
    if data.get("format_version") != FORMAT_VERSION:
        raise ResultError(f"{path} has format version {data.get('format_version')!r}; valid: {FORMAT_VERSION}")
    return data


def _validated(
    path: Path, plain: Mapping[str, Any]
) -> tuple[_Common, Mapping[str, _Pipeline], Mapping[str, Sequence[_Query]]]:
    """The parts of a result: what all pipelines share, then pipelines and queries by label."""
    try:
        if plain["kind"] == "run":
            run = _Run.model_validate(plain)
            return run, {run.pipeline.name: run.pipeline}, {run.pipeline.name: run.queries}
        compared = _Compare.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            again = f"make the result again with `tokenprune {plain['kind']}`"
            raise ResultError(f"{path} lacks '{place}', which a picture needs; {again}") from error
        raise ResultError(f"{path}: '{place}' is {first['input']!r:.60}: {first['msg']}") from error
    missing = sorted(set(compared.queries) - set(compared.pipelines))
    if missing:
        raise ResultError(f"{path} has queries of '{missing[0]}', but no such pipeline")
    return compared, compared.pipelines, compared.queries


def _cuts(where: str, query: _Query, prunable: Sequence[int]) -> list[Cut]:
    """A query's cuts in the order of the layers they follow."""
    known = set(prunable)
    after: dict[int, Cut] = {}
    for name, rows in query.kept_ids.items():
        if not rows or not (name == "embedding" or name.isdecimal()):
            raise ResultError(
                f"{where}: kept ids of cut '{name}' cannot be read; valid: 'embedding' or a layer's number"
            )
        unknown = sorted(set(rows[0]) - known)
        if unknown:
            raise ResultError(
                f"{where}: cut '{name}' kept token {unknown[0]}, which is no prunable token of the layout"
            )
        reasons = {reason: frozenset(ids[0]) for reason, ids in query.reasons.get(name, {}).items() if ids}
        after[-1 if name == "embedding" else int(name)] = Cut(name, frozenset(rows[0]), reasons)
    return [after[layer] for layer in sorted(after)]


def _query(
    step: int, query: _Query, cuts: Sequence[Cut], prunable: Sequence[int], names: Mapping[str, str]
) -> QueryResult:
    lost = losses(cuts, prunable)
    reasons = reasons_kept(cuts, prunable, lost)
    return QueryResult(
        step=step,
        mode=query.mode,
        fallback=query.fallback,
        held=query.tokens_held,
        cuts=tuple(cut.name for cut in cuts),
        lost=lost,
        reasons={token: names.get(name, name) for token, name in reasons.items()},
        looked_back={stage: steps[0] for stage, steps in query.looked_back.items() if steps and steps[0] is not None},
    )
