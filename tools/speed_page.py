"""Put what `tokenprune bench` said in result files into a page, between the markers that name them.

    python tools/speed_page.py docs/speed.md

Markers are the lines `<!-- bench FILE -->`, for the tables, and `<!-- targets FILE -->`, for what was aimed at beside
what was measured; what follows up to `<!-- end -->` is replaced. A test holds the page to the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_page import ROOT, fill

from tokenprune.bench.rows import SpeedRow
from tokenprune.report.bench_tables import bench_text


@dataclass(frozen=True)
class Target:
    """A number that was aimed at.

    Attributes:
        pipeline: Whose row.
        what: In words.
        measured: The number of that row.
        limit: What it should reach, or stay within.
        most: Whether the limit is the most it may be, not the least.
        unit: Written behind both.
    """

    pipeline: str
    what: str
    measured: Callable[[SpeedRow], float]
    limit: float
    most: bool = False
    unit: str = ""

    def line(self, row: SpeedRow) -> str:
        """The target's line of the table."""
        value = self.measured(row)
        met = value <= self.limit if self.most else value >= self.limit
        sign = "at most" if self.most else "at least"
        said = "met" if met else "missed"
        return f"| {self.what} | {sign} {self.limit:g}{self.unit} | {value:.3g}{self.unit} | {said} |"


TARGETS = (
    Target("specprune", "`specprune`: efficiency, speed-up over FLOP ratio", lambda row: row.row.efficiency, 0.92),
    Target(
        "specprune",
        "`specprune`: selection and history, share of the dense query",
        lambda row: 100 * row.row.selection,
        0.5,
        most=True,
        unit=" %",
    ),
)
"""For OpenVLA-OFT at the release's dimensions with two cameras, in bfloat16 on a CPU."""


def read(words: str) -> Mapping[str, Any]:
    """The result file that a marker names."""
    data: dict[str, Any] = json.loads((ROOT / words).read_text(encoding="utf-8"))
    return data


def tables(words: str) -> str:
    """What the file says, as `bench` prints it."""
    return f"```text\n{bench_text(read(words))}\n```"


def targets(words: str) -> str:
    """What was aimed at, beside what the file's first backbone reached."""
    rows = {row["pipeline"]: SpeedRow.from_json(row) for row in read(words)["results"][0]["rows"]}
    lines = [target.line(rows[target.pipeline]) for target in TARGETS if target.pipeline in rows]
    return "\n".join(["| | target | measured | |", "| --- | --- | --- | --- |", *lines])


def filled(page: str) -> str:
    """The page with every marked block as its file has it now."""
    return fill(fill(page, "bench", tables), "targets", targets)


def main() -> None:
    """Rewrite the page."""
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
