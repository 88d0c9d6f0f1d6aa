"""Measure memory and latency over many queries in one process.

    python tools/long_run.py --preset small --queries 5000 --out long-run.json

Episodes with other instructions follow each other, and a controller switches the mode all the time. Weights are
untrained random numbers unless the preset is a trained one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import tokenprune
from tokenprune.policy import Policy
from tokenprune.report.files import write_json
from tokenprune.report.provenance import provenance
from tokenprune.report.record import Provenance, Record
from tokenprune.report.result import ResultFile
from tokenprune.testing.matrix import random_observation

INSTRUCTIONS = (
    "put the bowl on the plate",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "push it",
)
EPISODE = 23
"""Queries of an episode; odd, so that resets fall on every query of the modes' cycle."""


class Stretch(Record):
    """Consecutive queries.

    Attributes:
        until: Queries so far at its end.
        resident_mb: Memory of the process then.
        device_mb: Memory allocated on a CUDA device then, 0 elsewhere.
        median_ms: Of its queries.
        modes: Its queries by mode.
        switch_ms: How much longer a query takes that switches to another mode than those that stay in that mode; median
            over modes that have both, None without any.
        reset_ms: The same for the first query of an episode, the reset before it included.
    """

    until: int
    resident_mb: float
    device_mb: float
    median_ms: float
    modes: dict[str, int]
    switch_ms: float | None
    reset_ms: float | None


class LongRunSettings(Record):
    """The options of the command."""

    backbone: str
    preset: str
    pipeline: str
    execution: str
    device: str
    queries: int
    stretch: int


class LongRunResult(ResultFile):
    """What the result file holds."""

    command = "tools/long_run.py"

    kind: Literal["long-run"] = "long-run"
    provenance: Provenance
    settings: LongRunSettings
    untrained: bool
    stretches: list[Stretch]


@dataclass(frozen=True)
class TimedQuery:
    """One query: its mode, milliseconds, and what came before it, `reset`, `switch` or nothing."""

    mode: str
    ms: float
    after: str


def long_run(policy: Policy, queries: int, stretch: int) -> Iterator[Stretch]:
    """Query the policy, and yield what was measured at the end of each stretch."""
    info, rng = policy.backbone.info, np.random.default_rng(0)
    observations = [random_observation(policy.backbone, rng) for _ in range(7)]
    timed: list[TimedQuery] = []
    previous = ""
    for query in range(queries):
        started = time.perf_counter()
        first = query % EPISODE == 0
        if first:
            policy.reset(INSTRUCTIONS[query // EPISODE % len(INSTRUCTIONS)])
        mode = policy.act(observations[query % len(observations)]).trace.mode
        spent = (time.perf_counter() - started) * 1e3
        timed.append(TimedQuery(mode, spent, "reset" if first else "switch" if mode != previous else ""))
        previous = mode
        for step in range(2):
            # Fast for some queries, then slow and downwards, so that a controller changes its mind.
            pace = 0.7 if query % 10 < 6 else -0.01
            after = observations[(query + step) % len(observations)]
            policy.executed(np.full(info.action.dims, pace), np.full(7, float(query)), observation=after)
        if (query + 1) % stretch == 0:
            yield summary(query + 1, timed)
            timed = []


def summary(until: int, queries: Sequence[TimedQuery]) -> Stretch:
    """Summarise a stretch that has just ended."""
    modes = Counter(query.mode for query in queries)
    plain = {mode: [query.ms for query in queries if (query.mode, query.after) == (mode, "")] for mode in modes}
    usual = {mode: statistics.median(spent) for mode, spent in plain.items() if spent}

    def longer(after: str) -> float | None:
        extra = [query.ms - usual[query.mode] for query in queries if query.after == after and query.mode in usual]
        return statistics.median(extra) if extra else None

    return Stretch(
        until=until,
        resident_mb=resident_mb(),
        device_mb=device_mb(),
        median_ms=statistics.median(query.ms for query in queries),
        modes=dict(modes),
        switch_ms=longer("switch"),
        reset_ms=longer("reset"),
    )


def resident_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def device_mb() -> float:
    """Return the memory that tensors hold on the CUDA device; 0 without one."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def signed(ms: float | None) -> str:
    """Return milliseconds with their sign, `-` where there are none."""
    return "-" if ms is None else f"{ms:+.1f}"


def main() -> None:
    """Run, print a line for each stretch, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="openvla-oft")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--pipeline", default="specprune")
    parser.add_argument("--execution", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--stretch", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    out = options.pop("out")
    settings = LongRunSettings(**options)
    policy = tokenprune.load(
        settings.backbone,
        preset=settings.preset,
        pipeline=settings.pipeline,
        device=settings.device,
        execution=settings.execution,
    )
    result = LongRunResult(
        provenance=provenance(policy.backbone.device),
        settings=settings,
        untrained=policy.backbone.info.untrained,
        stretches=[],
    )
    for stretch in long_run(policy, settings.queries, settings.stretch):
        print(
            f"{stretch.until:6d} queries  {stretch.resident_mb:8.1f} MB resident  "
            f"{stretch.device_mb:8.1f} MB on the device  {stretch.median_ms:8.2f} ms, "
            f"after a switch {signed(stretch.switch_ms)}, after a reset {signed(stretch.reset_ms)}",
            flush=True,
        )
        result = result.model_copy(update={"stretches": [*result.stretches, stretch]})
        write_json(out, result.to_json())


if __name__ == "__main__":
    main()
