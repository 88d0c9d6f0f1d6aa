"""A result of `bench` as text of 80 columns."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tokenprune.bench.result import BenchResult, CaseResult, SpeedRow
from tokenprune.compare.table import phase_table
from tokenprune.report.text import WIDTH, milliseconds, result_table, wrap_label


def bench_text(result: BenchResult) -> str:
    """Return everything: the device, tables of each backbone, dtype and mode, and what columns mean."""
    texts = [result.provenance.machine]
    texts += [case_text(case) for case in result.results]
    texts += [textwrap.fill(f"left out on {refusal.backbone}: {refusal.why}", WIDTH) for refusal in result.refused]
    if not result.complete:
        texts.append("The run was not finished: what is missing here was not measured.")
    return "\n\n".join([*texts, legend(result)])


def case_text(case: CaseResult) -> str:
    """Return the tables of one backbone, dtype and mode."""
    head = f"{case.backbone.name} {case.preset}, {case.dtype}, {case.mode}"
    lines = [
        f"{head}, attention {case.rows[0].kernel}",
        f"roof: {case.roof.flops / 1e12:.4g} TFLOP/s, {case.roof.bandwidth / 1e9:.4g} GB/s; "
        f"pairs per pipeline: {case.rows[-1].pairs}",
    ]
    tables = (speed_table(case.rows), phase_table(case.rows, case.follow_up), needs_table(case.rows))
    return "\n\n".join(["\n".join(lines), *map(_printed, tables)])


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Return a table of the whole query's time beside its FLOPs, and beside the least time this device allows."""
    table = result_table(
        "\npipeline", "tokens\nmean", "FLOP\nratio", "ms\np50", "\np95", "speed\nup", "\neff", "sel\n%",
        "TFLOP\n/s", "of\npeak", "floor\nms", "over\nfloor",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            wrap_label(row.pipeline),
            f"{row.tokens_mean:.0f}",
            f"{row.flop_ratio:.2f}",
            milliseconds(row.median_ms),
            milliseconds(row.p95_ms),
            f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}",
            f"{100 * row.selection:.2f}",
            _short(row.tflops),
            f"{100 * row.of_peak:.0f}%",
            milliseconds(row.floor_ms),
            _short(row.over_floor),
        )
    return table


def needs_table(rows: Sequence[SpeedRow]) -> Table:
    """Return a table of memory, waits for the device and the attention kernel."""
    table = result_table("\npipeline", "peak\nGB", "waits\n/query", "tokens\nlast", "\nGFLOP")
    table.add_column("\nattention kernel", overflow="fold")
    for row in rows:
        waits = "-" if row.waits is None else str(row.waits)
        last, gflops = f"{row.tokens_last:.0f}", f"{row.gflops:.4g}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        table.add_row(wrap_label(row.pipeline), peak, waits, last, gflops, row.kernel)
    return table


def legend(result: BenchResult) -> str:
    """Return what the columns mean, and what the numbers do not show."""
    lines = [
        "ms: the whole query, observation to actions. speed up: time of the dense",
        "query beside each over its own, median. eff: speed up / FLOP ratio. sel:",
        "choosing, moving and remembering tokens, % of dense time. TFLOP/s: needed",
        "FLOPs / time; of peak: of one large matrix product here. floor: each part's",
        "FLOPs at that peak, or its weights at the bandwidth of one large copy,",
        "whichever is longer. peak: memory, weights included. waits: of the host for",
        "the device, in one query.",
    ]
    if result.settings.reference == "upstream":
        lines += [
            "upstream reconstruction (ours): our weights and layout, run as repositories",
            "of the field do: eager attention, every map kept, unread logits computed.",
        ]
    if any(case.backbone.untrained for case in result.results):
        lines += [
            "The weights are untrained random numbers: a query costs what it does with",
            "trained ones, unless what it keeps depends on what it sees (keep: union).",
        ]
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return four characters, two decimals where they fit."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _printed(table: Table) -> str:
    printed = io.StringIO()
    Console(width=WIDTH, highlight=False, file=printed).print(table)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
