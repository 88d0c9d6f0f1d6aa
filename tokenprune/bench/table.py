"""What a result of `bench` says, as text of 80 columns."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tokenprune.bench.row import SpeedRow
from tokenprune.compare.table import phase_table
from tokenprune.report.text import WIDTH, broken, milliseconds

Result = Mapping[str, Any]


def bench_text(data: Mapping[str, Any]) -> str:
    """Everything: the device, tables of each backbone, dtype and mode, and what columns mean."""
    facts = data["provenance"]
    said = [facts.get("gpu") or f"{facts['cpu']}, {facts['torch_threads']} threads"]
    said += [result_text(result) for result in data["results"]]
    said += [textwrap.fill(f"left out on {r['backbone']}: {r['why']}", WIDTH) for r in data["refused"]]
    if not data["complete"]:
        said.append("The run was not finished: what is missing here was not measured.")
    return "\n\n".join([*said, legend(data)])


def result_text(result: Result) -> str:
    """The tables of one backbone, dtype and mode."""
    rows = [SpeedRow.from_json(row) for row in result["rows"]]
    roof, dense = result["roof"], rows[0]
    head = f"{result['backbone']['name']} {result['preset']}, {result['dtype']}, {result['mode']}"
    lines = [
        f"{head}, attention {dense.kernel}",
        f"roof: {roof['flops'] / 1e12:.4g} TFLOP/s, {roof['bandwidth'] / 1e9:.4g} GB/s; "
        f"pairs per pipeline: {rows[-1].pairs}",
    ]
    inner = tuple(row.row for row in rows)
    tables = (speed_table(rows), phase_table(inner, result["follow_up"]), needs_table(rows))
    return "\n\n".join(["\n".join(lines), *map(_printed, tables)])


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Time of the whole query beside its FLOPs, and beside the least this device allows."""
    table = _table(
        "\npipeline", "tokens\nmean", "FLOP\nratio", "ms\np50", "\np95", "speed\nup", "\neff", "sel\n%",
        "TFLOP\n/s", "of\npeak", "floor\nms", "over\nfloor",
    )  # fmt: skip
    for speed in rows:
        row = speed.row
        table.add_row(
            broken(row.pipeline),
            f"{row.tokens_mean:.0f}",
            f"{row.flop_ratio:.2f}",
            milliseconds(row.median_ms),
            milliseconds(row.p95_ms),
            f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}",
            f"{100 * row.selection:.2f}",
            _short(speed.tflops),
            f"{100 * speed.of_peak:.0f}%",
            milliseconds(speed.floor_ms),
            _short(speed.over_floor),
        )
    return table


def needs_table(rows: Sequence[SpeedRow]) -> Table:
    """Memory, waits and the attention kernel."""
    table = _table("\npipeline", "peak\nGB", "waits\n/query", "tokens\nlast", "\nGFLOP")
    table.add_column("\nattention kernel", overflow="fold")
    for speed in rows:
        waits = "-" if speed.waits is None else str(speed.waits)
        last, gflops = f"{speed.row.tokens_last:.0f}", f"{speed.row.gflops:.4g}"
        peak = "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e9:.2f}"
        table.add_row(broken(speed.row.pipeline), peak, waits, last, gflops, speed.kernel)
    return table


def legend(data: Mapping[str, Any]) -> str:
    """What the columns mean, and what the numbers do not say."""
    lines = [
        "ms: the whole query, observation to actions. speed up: time of the dense",
        "query beside each over its own, median. eff: speed up / FLOP ratio. sel:",
        "choosing, moving and remembering tokens, % of dense time. TFLOP/s: needed",
        "FLOPs / time; of peak: of one large matrix product here. floor: each part's",
        "FLOPs at that peak, or its weights at the bandwidth of one large copy,",
        "whichever is longer. peak: memory, weights included. waits: of the host for",
        "the device, in one query.",
    ]
    if data["settings"]["reference"] == "upstream":
        lines += [
            "upstream reconstruction (ours): our weights and layout, run as repositories",
            "of the field do: eager attention, every map kept, unread logits computed.",
        ]
    if any(result["backbone"]["untrained"] for result in data["results"]):
        lines += [
            "The weights are untrained random numbers: a query costs what it does with",
            "trained ones, unless what it keeps depends on what it sees (keep: union).",
        ]
    return "\n".join(lines)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column(headings[0], overflow="fold", min_width=15)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    """Four characters, two decimals where they fit."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _printed(table: Table) -> str:
    printed = io.StringIO()
    Console(width=WIDTH, highlight=False, file=printed).print(table)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
