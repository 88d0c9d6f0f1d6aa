"""The result files of `run` and `compare`: one model each, shared by what writes them and what reads them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from tokenprune.report.record import (
    BackboneRecord,
    LayoutRecord,
    PipelineData,
    Provenance,
    QueriedEpisode,
    Record,
    TraceWithIds,
)


class ResultFile(Record):
    """What the file of every kind begins with.

    Attributes:
        command: What writes files of this kind.
    """

    command: ClassVar[str]

    format_version: Literal[1] = 1
    kind: str


class RunSettings(Record):
    """What repeats a run or a comparison, besides its pipelines.

    Attributes:
        preset: What the backbone offers without a checkpoint, or None.
        checkpoint: Folder or hub id, or None.
        device: torch device.
        dtype: As it was asked for; may be `auto`.
        seed: Seed of an untrained preset's weights.
        options: The backbone's own options.
        episode: Path of the recorded episode, or `bundled`.
        execution: How plans were executed.
    """

    preset: str | None
    checkpoint: str | None
    device: str
    dtype: str
    seed: int
    options: dict[str, Any]
    episode: str
    execution: str


class EpisodeResult(ResultFile):
    """What a run and a comparison share; `settings` is None where Python code ran them on objects of its own."""

    provenance: Provenance
    settings: RunSettings | None
    backbone: BackboneRecord
    note: str
    episode: QueriedEpisode
    layout: LayoutRecord


class RunQuery(TraceWithIds):
    """One query of a run: what it did, and its actions `[H, D]` in the environment's units."""

    actions: list[list[float]]


class RunResult(EpisodeResult):
    """One pipeline over a recorded episode."""

    command = "tokenprune run"

    kind: Literal["run"] = "run"
    pipeline: PipelineData
    queries: list[RunQuery]
    findings: dict[str, dict[str, Any]]


class ComparedEpisode(QueriedEpisode):
    """The recorded episode with what its file says of its origin."""

    meta: dict[str, Any]


class Gain(Record):
    """What pruning gained: median speedup query by query, FLOP ratio, and the first over the second."""

    speedup: float
    flop_ratio: float
    efficiency: float


class CompareRow(Record):
    """One pipeline beside the dense policy.

    Attributes:
        pipeline: Its label.
        tokens_mean: Visual tokens held, mean over layers and queries.
        tokens_last: Visual tokens the last layer holds, mean over queries.
        gflops: Per query, the whole policy.
        flop_ratio: Dense FLOPs over its own.
        median_ms: Whole query, observation to actions, median.
        p95_ms: Whole query, 95th percentile.
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


class CompareResult(EpisodeResult):
    """Pipelines beside the dense policy on the same observations; everything needed to repeat or doubt the rows."""

    command = "tokenprune compare"

    kind: Literal["compare"] = "compare"
    episode: ComparedEpisode
    warmup_queries: int
    pipelines: dict[str, PipelineData]
    notes: dict[str, list[str]]
    rows: list[CompareRow] = Field(min_length=1)
    queries: dict[str, list[TraceWithIds]] = Field(min_length=1)
