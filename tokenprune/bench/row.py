"""What one pipeline's queries say about speed, beside the dense queries that ran in turn with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from tokenprune.bench.roofline import Roof, floor
from tokenprune.compare.row import Gain, Row, make_row
from tokenprune.model.flops import query_flops
from tokenprune.model.info import BackboneInfo
from tokenprune.policy import ActionChunk
from tokenprune.report.describe import trace_flops
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.plan import Cut, Plan

_STEPS = 32


@dataclass(frozen=True)
class Asked:
    """Queries of one policy, and what they needed.

    Attributes:
        chunks: Its answers, in the order of asking.
        peaks: Bytes at the peak of each query, weights included; None where that is not known.
        waits: Waits for the device in one query; None where that is not counted.
    """

    chunks: tuple[ActionChunk, ...]
    peaks: tuple[int | None, ...]
    waits: int | None

    def __add__(self, more: Asked) -> Asked:
        """Queries of the same policy asked later."""
        waits = more.waits if self.waits is None else self.waits
        return Asked(self.chunks + more.chunks, self.peaks + more.peaks, waits)


@dataclass(frozen=True)
class SpeedRow:
    """One pipeline on one backbone, in one dtype and mode.

    Attributes:
        row: What `compare` also says.
        pairs: Queries, each with a dense one beside it.
        tflops: Achieved per second: the FLOPs that a query needs over its time, median, in units of 1e12.
        of_peak: The same as a share of the device's peak.
        floor_ms: Least milliseconds that this device allows the query, median; see `roofline.floor`.
        over_floor: Time over floor, query by query, median.
        peak_bytes: Memory at the peak of a query, weights included, median: allocated on a GPU, resident elsewhere;
            None where that is not known.
        waits: Waits for the device in one query; None where that is not counted.
        kernel: Attention kernel of the first layer.
        times: Milliseconds of every query, and of the dense ones beside them.
    """

    row: Row
    pairs: int
    tflops: float
    of_peak: float
    floor_ms: float
    over_floor: float
    peak_bytes: int | None
    waits: int | None
    kernel: str
    times: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, flat."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "row"}
        return {**asdict(self.row), **own}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SpeedRow:
        """The row that `to_json` wrote."""
        inner = {field.name: data[field.name] for field in fields(Row)}
        row = Row(**{**inner, "prefill": Gain(**inner["prefill"])})
        return cls(row=row, **{field.name: data[field.name] for field in fields(cls) if field.name != "row"})


def speed_row(label: str, own: Asked, dense: Asked, info: BackboneInfo, roof: Roof, itemsize: int) -> SpeedRow:
    """Summarise one pipeline's queries beside the dense ones; those a controller answered have no floor."""
    traces = [chunk.trace for chunk in own.chunks]
    ran = [trace for trace in traces if not trace.answered]
    rates = np.array([trace_flops(info, trace).total / trace.milliseconds * 1e3 for trace in ran])
    floors = np.array([floor(info, trace.plan, roof, itemsize).total for trace in ran])
    rate = _median(rates)
    known = [peak for peak in own.peaks if peak is not None]
    return SpeedRow(
        row=make_row(label, own.chunks, dense.chunks, info),
        pairs=len(traces),
        tflops=rate / 1e12,
        of_peak=rate / roof.flops,
        floor_ms=_median(floors),
        over_floor=_median(np.array([trace.milliseconds for trace in ran]) / floors),
        peak_bytes=int(np.median(known)) if known else None,
        waits=own.waits,
        kernel=next((trace.kernel for trace in ran), ""),
        times={
            "own": [round(trace.milliseconds, 4) for trace in traces],
            "dense": [round(chunk.trace.milliseconds, 4) for chunk in dense.chunks],
        },
    )


def _median(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.median(values)) if values.size else 0.0


def curve(info: BackboneInfo, layout: TokenLayout, roof: Roof, itemsize: int) -> list[dict[str, float]]:
    """FLOPs and floor of queries that hold the same number of visual tokens in every layer, from none to all."""
    every, dense = len(layout.prunable), Plan.dense(layout, info.decoder.depth)
    points = []
    for keep in sorted({round(every * step / _STEPS) for step in range(_STEPS + 1)}):
        plan = replace(dense, cuts=(Cut(-1, (), every, keep),))
        flops = query_flops(info, plan).total
        points.append({"tokens": keep, "gflops": flops / 1e9, "floor_ms": floor(info, plan, roof, itemsize).total})
    return points


def dense_row(asked: Sequence[Asked], info: BackboneInfo, roof: Roof, itemsize: int) -> SpeedRow:
    """The dense policy in all its queries, whichever pipeline stood beside it."""
    first, *more = asked
    together = sum(more, first)
    return speed_row("dense", together, together, info, roof, itemsize)
