"""Many queries in one process, and what becomes of memory and latency.

    python tools/long_run.py --preset small --queries 5000 --out long-run.json

The policy is asked, resets, gets other instructions, and a controller switches its mode all the time. Weights are
untrained random numbers unless the preset is a trained one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenprune
from tokenprune.policy import Policy
from tokenprune.report.provenance import provenance
from tokenprune.testing.matrix import random_observation

INSTRUCTIONS = (
    "put the bowl on the plate",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "push it",
)
EPISODE = 23
"""Queries of an episode; odd, so that resets fall at every place of the modes' turns."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of queries.

    Attributes:
        until: Queries asked by its end.
        resident_mb: Memory of the process then.
        device_mb: Memory allocated on a CUDA device then, 0 elsewhere.
        median_ms: Of a query in it.
        modes: Queries of each mode in it.
        switch_ms: How much longer a query takes in another mode than the one before it, than others of its mode; median
            over those whose mode had others, None without any.
        reset_ms: The same of the first query of an episode and the reset before it.
    """

    until: int
    resident_mb: float
    device_mb: float
    median_ms: float
    modes: dict[str, int]
    switch_ms: float | None
    reset_ms: float | None


@dataclass(frozen=True)
class Asked:
    """One query: its mode, milliseconds, and what came before it, `reset`, `switch` or nothing."""

    mode: str
    ms: float
    after: str


def long_run(policy: Policy, queries: int, stretch: int) -> Iterator[Stretch]:
    """Ask the policy and measure at the end of each stretch."""
    info, rng = policy.backbone.info, np.random.default_rng(0)
    seen = [random_observation(policy.backbone, rng) for _ in range(7)]
    asked: list[Asked] = []
    before = ""
    for query in range(queries):
        started = time.perf_counter()
        first = query % EPISODE == 0
        if first:
            policy.reset(INSTRUCTIONS[query // EPISODE % len(INSTRUCTIONS)])
        mode = policy.act(seen[query % len(seen)]).trace.mode
        spent = (time.perf_counter() - started) * 1e3
        asked.append(Asked(mode, spent, "reset" if first else "switch" if mode != before else ""))
        before = mode
        for step in range(2):
            # Fast for some queries, then slow and downwards, so that a controller changes its mind.
            pace = 0.7 if query % 10 < 6 else -0.01
            after = seen[(query + step) % len(seen)]
            policy.executed(np.full(info.action.dims, pace), np.full(7, float(query)), observation=after)
        if (query + 1) % stretch == 0:
            yield summary(query + 1, asked)
            asked = []


def summary(until: int, asked: Sequence[Asked]) -> Stretch:
    """What a stretch says that has just ended."""
    modes = Counter(one.mode for one in asked)
    plain = {mode: [one.ms for one in asked if (one.mode, one.after) == (mode, "")] for mode in modes}
    usual = {mode: statistics.median(spent) for mode, spent in plain.items() if spent}

    def more(after: str) -> float | None:
        longer = [one.ms - usual[one.mode] for one in asked if one.after == after and one.mode in usual]
        return statistics.median(longer) if longer else None

    median = statistics.median(one.ms for one in asked)
    return Stretch(until, resident_mb(), device_mb(), median, dict(modes), more("switch"), more("reset"))


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def device_mb() -> float:
    """Memory that tensors hold on the CUDA device."""
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def signed(ms: float | None) -> str:
    """As it is printed."""
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
    given = parser.parse_args()
    policy = tokenprune.load(
        given.backbone, preset=given.preset, pipeline=given.pipeline, device=given.device, execution=given.execution
    )
    data: dict[str, Any] = {
        "kind": "long-run",
        "provenance": provenance(policy.backbone.device),
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "untrained": policy.backbone.info.untrained,
        "stretches": [],
    }
    for one in long_run(policy, given.queries, given.stretch):
        print(
            f"{one.until:6d} queries  {one.resident_mb:8.1f} MB resident  {one.device_mb:8.1f} MB on the device  "
            f"{one.median_ms:8.2f} ms, after a switch {signed(one.switch_ms)}, after a reset {signed(one.reset_ms)}",
            flush=True,
        )
        data["stretches"].append(asdict(one))
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
