"""Put what `tokenprune bench` said in result files into a page, between the markers that name them.

    python tools/speed_page.py docs/speed.md

Markers are the lines `<!-- bench FILE -->`, for the tables and the chart of the same name, `<!-- targets FILE … -->`,
for what was aimed at beside what was measured, and `<!-- long-run FILE -->`; what follows up to `<!-- end -->` is
replaced. Where there is no such file, the page says so. A test holds the page to the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_page import ROOT, fill
from long_run import signed

from tokenprune.bench.row import SpeedRow
from tokenprune.bench.table import bench_text
from tokenprune.bench.upstream import UPSTREAM

MISSING = "Not measured yet: no GPU was at hand."
Rows = Mapping[str, SpeedRow]


@dataclass(frozen=True)
class Target:
    """A number that was aimed at.

    Attributes:
        what: In words.
        measured: The number, from the rows of one backbone in one mode by pipeline.
        limit: What it should reach, or stay within.
        most: Whether the limit is the most it may be, not the least.
        unit: Written behind both.
        backbone: Registered name.
        cameras: How many it looks through.
    """

    what: str
    measured: Callable[[Rows], float]
    limit: float
    most: bool = False
    unit: str = ""
    backbone: str = "openvla-oft"
    cameras: int = 2

    def line(self, rows: Rows | None) -> str:
        """The target's line of the table; without rows, that nothing was measured."""
        aim = f"| {self.what} | {'at most' if self.most else 'at least'} {self.limit:g}{self.unit} |"
        if rows is None:
            return f"{aim} - | not measured |"
        value = self.measured(rows)
        met = value <= self.limit if self.most else value >= self.limit
        return f"{aim} {value:.3g}{self.unit} | {'met' if met else 'missed'} |"


EFFICIENCY = "`specprune`: efficiency, speed-up over FLOP ratio"


def efficiency(rows: Rows) -> float:
    """Of SpecPrune."""
    return rows["specprune"].row.efficiency


def choosing_ms(rows: Rows) -> float:
    """Milliseconds that SpecPrune spends on choosing and remembering."""
    phases = rows["specprune"].row.phases
    return phases["selection"] + phases["history"]


TARGETS = {
    "eager": (
        Target(EFFICIENCY, efficiency, 0.92),
        Target(
            "`specprune`: selection and history, share of the dense query",
            lambda rows: 100 * rows["specprune"].row.selection, 0.5, most=True, unit=" %",
        ),
    ),
    "cuda_graph": (
        Target("dense: time over the device's floor", lambda rows: rows["dense"].over_floor, 1.5, most=True),
        Target("`specprune`: times faster than dense", lambda rows: rows["specprune"].row.speedup, 1.9),
        Target(EFFICIENCY, efficiency, 0.9),
        Target("`specprune`: selection and history", choosing_ms, 0.3, most=True, unit=" ms"),
        Target(
            "`specprune`: times faster than the upstream reconstruction",
            lambda rows: rows[UPSTREAM].row.median_ms / rows["specprune"].row.median_ms, 4,
        ),
        Target(
            "pi0, three cameras, `specprune`: times faster than dense",
            lambda rows: rows["specprune"].row.speedup, 1.4, backbone="pi0", cameras=3,
        ),
    ),
}  # fmt: skip
"""By mode, at the releases' dimensions in bfloat16: call by call on a CPU, as graphs on an H200."""


def read(words: str) -> Mapping[str, Any] | None:
    """The result file that a marker names, if it is there."""
    path = ROOT / words
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def tables(words: str) -> str:
    """What the file says, as `bench` prints it, with its chart."""
    data = read(words)
    if data is None:
        return MISSING
    chart = f"assets/{Path(words).stem}.png"
    drawn = f"![Latency against kept tokens, with what FLOPs alone promise and the floor]({chart})\n\n"
    return f"{drawn if (ROOT / 'docs' / chart).exists() else ''}```text\n{bench_text(data)}\n```"


def targets(words: str) -> str:
    """What was aimed at, beside what was reached according to the files."""
    files = [data for data in map(read, words.split()) if data is not None]
    mode = "eager" if files and files[0]["provenance"]["gpu"] is None else "cuda_graph"
    found: dict[tuple[str, int], Rows] = {}
    for result in (result for data in files for result in data["results"] if result["mode"] == mode):
        backbone = result["backbone"]["name"], len(result["backbone"]["views"])
        found[backbone] = {row["pipeline"]: SpeedRow.from_json(row) for row in result["rows"]}
    lines = [target.line(found.get((target.backbone, target.cameras))) for target in TARGETS[mode]]
    return "\n".join(["| | target | measured | |", "| --- | --- | --- | --- |", *lines])


def long_run(words: str) -> str:
    """Memory and time by stretches of queries, as `long_run.py` wrote them."""
    data = read(words)
    if data is None:
        return MISSING
    lines = ["| queries | modes | resident MB | median ms | more after a switch | after a reset |", f"|{' --- |' * 6}"]
    for stretch in data["stretches"]:
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(stretch["modes"].items()))
        memory, median = f"{stretch['resident_mb']:.1f}", f"{stretch['median_ms']:.1f}"
        more = f"{signed(stretch['switch_ms'])} | {signed(stretch['reset_ms'])}"
        lines.append(f"| {stretch['until']} | {modes} | {memory} | {median} | {more} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with every marked block as its file has it now."""
    for word, told in (("bench", tables), ("targets", targets), ("long-run", long_run)):
        page = fill(page, word, told)
    return page


def main() -> None:
    """Rewrite the page."""
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
