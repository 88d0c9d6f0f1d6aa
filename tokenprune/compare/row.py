"""Summarises one pipeline's queries beside the dense queries on the same observations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenprune.engine.trace import QueryTrace
from tokenprune.model.info import BackboneInfo
from tokenprune.model.phase import Phase
from tokenprune.policy import ActionChunk
from tokenprune.report.describe import trace_flops
from tokenprune.report.result import CompareRow, Gain

Array = np.ndarray[Any, np.dtype[np.float64]]


def make_row(label: str, own: Sequence[ActionChunk], dense: Sequence[ActionChunk], info: BackboneInfo) -> CompareRow:
    """Summarise one pipeline's queries beside the dense ones at the same steps."""
    traces = [chunk.trace for chunk in own]
    times = np.array([trace.milliseconds for trace in traces])
    baseline = np.array([chunk.trace.milliseconds for chunk in dense])
    spent, spent_dense = ([trace_flops(info, c.trace) for c in chunks] for chunks in (own, dense))
    flops = np.mean([f.total for f in spent])
    replayed = sum(trace.answered for trace in traces)
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
    return CompareRow(
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
    return Gain(speedup=speedup, flop_ratio=flop_ratio, efficiency=speedup / flop_ratio)


def _prefill(trace: QueryTrace) -> float:
    return trace.phases.get(Phase.DECODER, 0.0) + trace.phases.get(Phase.SELECTION, 0.0)


def _own_work(trace: QueryTrace) -> float:
    return trace.phases.get(Phase.SELECTION, 0.0) + trace.phases.get(Phase.HISTORY, 0.0)
