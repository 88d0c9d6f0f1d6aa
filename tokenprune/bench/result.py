"""The result file of `bench`, as one model that the benchmark writes and tables, charts and pages read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenprune.bench.roofline import Roof
from tokenprune.bench.settings import BenchSettings
from tokenprune.report.record import (
    BackboneRecord,
    LayoutRecord,
    PipelineData,
    Provenance,
    QueriedEpisode,
    Record,
    TraceRecord,
)
from tokenprune.report.result import CompareRow, ResultFile

CaseKey = tuple[str, str, str, str]
"""Backbone, preset, dtype and execution mode."""


class PairedTimes(Record):
    """Milliseconds of every query, and of the dense query beside each."""

    own: list[float]
    dense: list[float]


class SpeedRow(CompareRow):
    """One pipeline in one dtype and mode: a row of `compare`, and speed beside the limits of the device.

    Attributes:
        pairs: Queries, each with a dense one beside it.
        tflops: Achieved per second: the FLOPs that a query needs over its time, median, in units of 1e12.
        of_peak: `tflops` as a share of the device's peak.
        floor_ms: Least milliseconds that this device allows the query, median; see `roofline.floor`.
        over_floor: Time over floor, query by query, median.
        peak_bytes: Memory at the peak of a query, weights included, median: allocated on a GPU, resident elsewhere;
            None where that is not known.
        waits: Waits for the device in one query; None where that is not counted.
        kernel: Attention kernel of the first layer.
        times: Milliseconds of every pair.
    """

    pairs: int
    tflops: float
    of_peak: float
    floor_ms: float
    over_floor: float
    peak_bytes: int | None
    waits: int | None
    kernel: str
    times: PairedTimes


class CurvePoint(Record):
    """FLOPs and floor of a query that holds the same number of visual tokens in every layer."""

    tokens: int
    gflops: float
    floor_ms: float


class PipelineTrace(Record):
    """What the stages of a pipeline say of themselves, and what its last query did."""

    notes: list[str]
    last_query: TraceRecord


class CaseResult(Record):
    """One backbone, in one dtype and mode; the first row is dense."""

    key: CaseKey
    backbone: BackboneRecord
    preset: str
    dtype: str
    mode: str
    episode: QueriedEpisode
    layout: LayoutRecord
    follow_up: str | None
    roof: Roof
    curve: list[CurvePoint] = Field(min_length=1)
    rows: list[SpeedRow] = Field(min_length=1)
    pipelines: dict[str, PipelineTrace]


class Refusal(Record):
    """A pipeline that a backbone cannot run, and why."""

    backbone: str
    pipeline: str
    why: str


class BenchResult(ResultFile):
    """Pipelines at real size, on backbones, in dtypes and modes."""

    command = "tokenprune bench"

    kind: Literal["bench"] = "bench"
    complete: bool
    provenance: Provenance
    settings: BenchSettings
    pipelines: dict[str, PipelineData]
    refused: list[Refusal]
    results: list[CaseResult]
