"""Write the results of `tokenprune bench` into a page, between the markers that name the files.

    python tools/speed_page.py docs/speed.md

Markers are the lines `<!-- bench FILE -->` for the tables and the chart of the same name, `<!-- targets FILE … -->` for
targets beside measured values, and `<!-- long-run FILE -->`. What follows up to `<!-- end -->` is replaced. Where there
is no such file, the page says so. A test compares the page with the files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evidence_page import ROOT, fill
from long_run import LongRunResult, signed

from tokenprune.bench.result import BenchResult, SpeedRow
from tokenprune.bench.table import bench_text
from tokenprune.bench.upstream import UPSTREAM
from tokenprune.report.files import read_result

MISSING = "Not measured yet: no GPU was at hand."
Rows = Mapping[str, SpeedRow]


@dataclass(frozen=True)
class Target:
    """A number to reach, or to stay within.

    Attributes:
        name: In words.
        measured: Returns the number from the rows of one backbone in one mode, by pipeline.
        limit: The least it should be, or the most.
        most: Whether the limit is the most.
        unit: Written behind limit and value.
        backbone: Registered name.
        cameras: Number of views.
    """

    name: str
    measured: Callable[[Rows], float]
    limit: float
    most: bool = False
    unit: str = ""
    backbone: str = "openvla-oft"
    cameras: int = 2

    def line(self, rows: Rows | None) -> str:
        """Return the target's line of the table; without rows it says `not measured`."""
        aim = f"| {self.name} | {'at most' if self.most else 'at least'} {self.limit:g}{self.unit} |"
        if rows is None:
            return f"{aim} - | not measured |"
        value = self.measured(rows)
        met = value <= self.limit if self.most else value >= self.limit
        return f"{aim} {value:.3g}{self.unit} | {'met' if met else 'missed'} |"


EFFICIENCY = "`specprune`: efficiency, speed-up over FLOP ratio"


def efficiency(rows: Rows) -> float:
    """Return the efficiency of SpecPrune."""
    return rows["specprune"].efficiency


def choosing_ms(rows: Rows) -> float:
    """Return the milliseconds that SpecPrune spends on choosing and remembering."""
    phases = rows["specprune"].phases
    return phases["selection"] + phases["history"]


TARGETS = {
    "eager": (
        Target(EFFICIENCY, efficiency, 0.92),
        Target(
            "`specprune`: selection and history, share of the dense query",
            lambda rows: 100 * rows["specprune"].selection, 0.5, most=True, unit=" %",
        ),
    ),
    "cuda_graph": (
        Target("dense: time over the device's floor", lambda rows: rows["dense"].over_floor, 1.5, most=True),
        Target("`specprune`: times faster than dense", lambda rows: rows["specprune"].speedup, 1.9),
        Target(EFFICIENCY, efficiency, 0.9),
        Target("`specprune`: selection and history", choosing_ms, 0.3, most=True, unit=" ms"),
        Target(
            "`specprune`: times faster than the upstream reconstruction",
            lambda rows: rows[UPSTREAM].median_ms / rows["specprune"].median_ms, 4,
        ),
        Target(
            "pi0, three cameras, `specprune`: times faster than dense",
            lambda rows: rows["specprune"].speedup, 1.4, backbone="pi0", cameras=3,
        ),
    ),
}  # fmt: skip
"""By execution mode, at the releases' dimensions in bfloat16: eager on a CPU, CUDA graphs on an H200."""


def path_of(name: str) -> Path | None:
    """Return the path of the result file that a marker names; None where there is no such file."""
    path = ROOT / name
    return path if path.exists() else None


def tables(name: str) -> str:
    """Return what `bench` prints of the file, with its chart."""
    path = path_of(name)
    if path is None:
        return MISSING
    chart = f"assets/{path.stem}.png"
    drawn = f"![Latency against kept tokens, with what FLOPs alone promise and the floor]({chart})\n\n"
    text = bench_text(read_result(path, BenchResult))
    return f"{drawn if (ROOT / 'docs' / chart).exists() else ''}```text\n{text}\n```"


def targets(names: str) -> str:
    """Return a table of targets beside what the files measured."""
    files = [read_result(path, BenchResult) for path in map(path_of, names.split()) if path is not None]
    mode = "eager" if files and files[0].provenance.gpu is None else "cuda_graph"
    found: dict[tuple[str, int], Rows] = {}
    for case in (case for file in files for case in file.results if case.mode == mode):
        found[case.backbone.name, len(case.backbone.views)] = {row.pipeline: row for row in case.rows}
    lines = [target.line(found.get((target.backbone, target.cameras))) for target in TARGETS[mode]]
    return "\n".join(["| | target | measured | |", "| --- | --- | --- | --- |", *lines])


def long_run(name: str) -> str:
    """Return a table of memory and time by stretches of queries, as `long_run.py` wrote them."""
    path = path_of(name)
    if path is None:
        return MISSING
    lines = ["| queries | modes | resident MB | median ms | more after a switch | after a reset |", f"|{' --- |' * 6}"]
    for stretch in read_result(path, LongRunResult).stretches:
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(stretch.modes.items()))
        more = f"{signed(stretch.switch_ms)} | {signed(stretch.reset_ms)}"
        lines.append(f"| {stretch.until} | {modes} | {stretch.resident_mb:.1f} | {stretch.median_ms:.1f} | {more} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """Return the page with every marked block as its file has it now."""
    for marker, text_of in (("bench", tables), ("targets", targets), ("long-run", long_run)):
        page = fill(page, marker, text_of)
    return page


def main() -> None:
    """Rewrite the page."""
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
