"""Reads what `tokenprune run` and `tokenprune compare` wrote, as far as a picture needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import ResultError, nearest
from tokenprune.report.files import read_result as read_file
from tokenprune.report.record import TraceWithIds
from tokenprune.report.result import CompareResult, RunResult
from tokenprune.viz.result import Cut, QueryResult, Result, View, further_reasons, losses, reasons_kept


def read_result(path: Path, pipeline: str | None = None) -> Result:
    """Read one pipeline's part of a result file.

    Args:
        path: A file that `tokenprune run` or `tokenprune compare` wrote.
        pipeline: Label of the pipeline; when left out, the first of a comparison that is not dense.

    Raises:
        ResultError: If the file is missing, no such result, damaged, or has no such pipeline.
    """
    file = read_file(path, RunResult, CompareResult)
    assert isinstance(file, RunResult | CompareResult)
    settings, backbone, steps = file.settings, file.backbone, file.episode.steps
    if settings is None:
        raise ResultError(f"{path} has no 'settings'; make the result with `{file.command}`")
    queries, modes = _by_label(path, file)
    if pipeline is None:
        pipeline = next((label for label in queries if label != "dense"), next(iter(queries)))
    if pipeline not in queries:
        raise ResultError(f"{path} has no pipeline '{pipeline}'{nearest(pipeline, queries)}")
    traces = queries[pipeline]
    if len(traces) != len(steps):
        raise ResultError(f"{path}: pipeline '{pipeline}' has {len(traces)} queries, the episode {len(steps)} steps")
    views = tuple(View(s.view, s.start, s.length, s.grid, s.prunable) for s in file.layout.segments if s.view)
    for view in views:
        if view.grid and view.grid[0] * view.grid[1] != view.length:
            raise ResultError(f"{path}: grid {view.grid} of view '{view.name}' does not hold {view.length} tokens")
    prunable = [i for view in views if view.prunable for i in view.span]
    cuts = [_cuts(f"{path}: step {step}", trace, prunable) for step, trace in zip(steps, traces, strict=True)]
    names = further_reasons({name for own in cuts for cut in own for name in cut.reasons})
    n_tokens = sum(segment.length for segment in file.layout.segments)
    return Result(
        label=pipeline,
        backbone=backbone.name,
        source=backbone.source,
        untrained=backbone.untrained,
        preset=settings.preset,
        checkpoint=settings.checkpoint,
        options=settings.options,
        episode=file.episode.name,
        episode_path=None if settings.episode == "bundled" else Path(settings.episode),
        instruction=file.episode.instruction,
        horizon=backbone.action.horizon,
        translation=backbone.action.groups.get("translation", ()),
        views=views,
        n_tokens=n_tokens,
        n_fixed=n_tokens - len(prunable),
        modes=tuple(dict.fromkeys((*modes[pipeline], *(trace.mode for trace in traces)))),
        queries=tuple(
            _query(step, trace, own, prunable, names) for step, trace, own in zip(steps, traces, cuts, strict=True)
        ),
    )


def _by_label(
    path: Path, file: RunResult | CompareResult
) -> tuple[Mapping[str, Sequence[TraceWithIds]], Mapping[str, Sequence[str]]]:
    """Return queries, and the modes that a pipeline declares, by its label."""
    if isinstance(file, RunResult):
        label = file.pipeline["name"]
        return {label: file.queries}, {label: _modes(file.pipeline)}
    missing = sorted(set(file.queries) - set(file.pipelines))
    if missing:
        raise ResultError(f"{path} has queries of '{missing[0]}', but no such pipeline")
    return file.queries, {label: _modes(pipeline) for label, pipeline in file.pipelines.items()}


def _modes(pipeline: Mapping[str, Any]) -> Sequence[str]:
    modes: Sequence[str] = pipeline.get("modes", ())
    return modes


def _cuts(where: str, trace: TraceWithIds, prunable: Sequence[int]) -> list[Cut]:
    """Return the cuts of a query in the order of the layers that they follow."""
    known = set(prunable)
    after: dict[int, Cut] = {}
    for name, rows in trace.kept_ids.items():
        if not rows or not (name == "embedding" or name.isdecimal()):
            raise ResultError(
                f"{where}: kept ids of cut '{name}' cannot be read; valid: 'embedding' or a layer's number"
            )
        unknown = sorted(set(rows[0]) - known)
        if unknown:
            raise ResultError(
                f"{where}: cut '{name}' kept token {unknown[0]}, which is no prunable token of the layout"
            )
        reasons = {reason: frozenset(ids[0]) for reason, ids in trace.reasons.get(name, {}).items() if ids}
        after[-1 if name == "embedding" else int(name)] = Cut(name, frozenset(rows[0]), reasons)
    return [after[layer] for layer in sorted(after)]


def _query(
    step: int, trace: TraceWithIds, cuts: Sequence[Cut], prunable: Sequence[int], names: Mapping[str, str]
) -> QueryResult:
    lost = losses(cuts, prunable)
    reasons = reasons_kept(cuts, prunable, lost)
    return QueryResult(
        step=step,
        mode=trace.mode,
        fallback=trace.fallback,
        held=tuple(trace.tokens_held),
        cuts=tuple(cut.name for cut in cuts),
        lost=lost,
        reasons={token: names.get(name, name) for token, name in reasons.items()},
        looked_back={stage: steps[0] for stage, steps in trace.looked_back.items() if steps and steps[0] is not None},
    )
