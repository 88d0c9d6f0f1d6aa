"""Summarises one pipeline's queries: speed beside the dense queries, and beside what the device allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tokenprune.bench.result import CurvePoint, PairedTimes, SpeedRow
from tokenprune.bench.roofline import Roof, floor
from tokenprune.compare.row import make_row
from tokenprune.model.flops import query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import ActionChunk
from tokenprune.report.describe import trace_flops
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Cut, Plan

_STEPS = 32
"""Points of the curve besides its first."""


@dataclass(frozen=True)
class MeteredQueries:
    """Queries of one policy with their needs.

    Attributes:
        chunks: What each query returned, in order.
        peaks: Bytes at the peak of each query, weights included; None where that is not known.
        waits: Waits for the device in one query; None where that is not counted.
    """

    chunks: tuple[ActionChunk, ...]
    peaks: tuple[int | None, ...]
    waits: int | None

    def __add__(self, later: MeteredQueries) -> MeteredQueries:
        """Return these queries and later ones of the same policy."""
        waits = later.waits if self.waits is None else self.waits
        return MeteredQueries(self.chunks + later.chunks, self.peaks + later.peaks, waits)


def speed_row(
    label: str, own: MeteredQueries, dense: MeteredQueries, info: BackboneInfo, roof: Roof, itemsize: int
) -> SpeedRow:
    """Summarise one pipeline's queries beside the dense ones; those that a controller answered have no floor."""
    traces = [chunk.trace for chunk in own.chunks]
    ran = [trace for trace in traces if not trace.answered]
    rates = np.array([trace_flops(info, trace).total / trace.milliseconds * 1e3 for trace in ran])
    floors = np.array([floor(info, trace.plan, roof, itemsize).total for trace in ran])
    rate = _median(rates)
    peaks = [peak for peak in own.peaks if peak is not None]
    return SpeedRow(
        **dict(make_row(label, own.chunks, dense.chunks, info)),
        pairs=len(traces),
        tflops=rate / 1e12,
        of_peak=rate / roof.flops,
        floor_ms=_median(floors),
        over_floor=_median(np.array([trace.milliseconds for trace in ran]) / floors),
        peak_bytes=int(np.median(peaks)) if peaks else None,
        waits=own.waits,
        kernel=next((trace.kernel for trace in ran), ""),
        times=PairedTimes(
            own=[round(trace.milliseconds, 4) for trace in traces],
            dense=[round(chunk.trace.milliseconds, 4) for chunk in dense.chunks],
        ),
    )


def dense_row(blocks: Sequence[MeteredQueries], info: BackboneInfo, roof: Roof, itemsize: int) -> SpeedRow:
    """Summarise all dense queries, whichever pipeline they ran beside."""
    first, *others = blocks
    together = sum(others, first)
    return speed_row("dense", together, together, info, roof, itemsize)


def curve(info: BackboneInfo, layout: TokenLayout, roof: Roof, itemsize: int) -> list[CurvePoint]:
    """Return FLOPs and floor of queries that hold the same number of visual tokens in every layer, from none to all."""
    every, dense = len(layout.prunable), Plan.dense(layout, info.decoder.depth)
    points = []
    for keep in sorted({round(every * step / _STEPS) for step in range(_STEPS + 1)}):
        plan = replace(dense, cuts=(Cut(-1, (), every, keep),))
        gflops, least = query_flops(info, plan).total / 1e9, floor(info, plan, roof, itemsize).total
        points.append(CurvePoint(tokens=keep, gflops=gflops, floor_ms=least))
    return points


def _median(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.median(values)) if values.size else 0.0
