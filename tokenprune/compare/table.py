"""A comparison as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.report.text import milliseconds, result_table, wrap_label

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.report.result import CompareRow


def compare_table(rows: Sequence[CompareRow]) -> Table:
    """Return a table with one line per pipeline; `compare_legend` explains the columns."""
    groups = tuple(name for name in rows[0].error if name != "gripper")
    table = result_table(
        "\npipeline", "tokens\nmean", "\nlast", "FLOP\nG", "\nratio", "ms\np50", "\np95", "speed\nup", "\neff",
        "sel\n%", *(f"{'' if i else 'L1'}\n{name[:4]}" for i, name in enumerate(groups)), "grip\nflip",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            wrap_label(row.pipeline),
            f"{row.tokens_mean:.0f}",
            f"{row.tokens_last:.0f}",
            f"{row.gflops:.4g}",
            f"{row.flop_ratio:.2f}",
            milliseconds(row.median_ms),
            milliseconds(row.p95_ms),
            f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}",
            f"{100 * row.selection:.1f}",
            *(f"{row.error[name]:.2f}" for name in groups),
            str(row.gripper_flips),
        )
    return table


def phase_table(rows: Sequence[CompareRow], follow_up: str | None) -> Table:
    """Return a table of where the time of a query goes, and what pruning gained in the decoder alone.

    Args:
        rows: One line each.
        follow_up: Name of the phase after the layout's tokens, if the backbone has one; the decoder's first pass is
            then called prefill.
    """
    decoder = "decoder" if follow_up is None else "prefill"
    named = ("vision", "selection", "decoder", *(() if follow_up is None else (follow_up,)), "head")
    shown = {"decoder": decoder, "selection": "select"}
    phases = [f"\n{shown.get(phase, phase)}" for phase in (*named, "other")]
    table = result_table("ms p50\nby phase", *phases, f"{decoder}\nspeedup", "FLOP\nratio", "\neff", min_width=12)
    for row in rows:
        rest = sum(ms for phase, ms in row.phases.items() if phase not in named)
        gain = row.prefill
        table.add_row(
            wrap_label(row.pipeline),
            *(milliseconds(row.phases.get(phase, 0.0)) for phase in named),
            milliseconds(rest),
            *(f"{value:.2f}" for value in (gain.speedup, gain.flop_ratio, gain.efficiency)),
        )
    return table


def compare_legend(rows: Sequence[CompareRow], note: str) -> str:
    """Return what the columns mean, and what the numbers do not show."""
    lines = [
        "tokens: visual tokens held, mean over layers and at the last one. ms: the whole",
        "query, observation to actions. speed up: dense over own time, query by query,",
        "median. eff: speed up / FLOP ratio. sel: choosing, moving and remembering",
        "tokens, % of dense time. L1 and gripper flips: against dense, over",
        f"{rows[0].actions} actions. By phase: select and the decoder's gain count choosing; other is",
        "preprocessing and memory.",
    ]
    fallbacks = [f"{row.pipeline} {row.fallbacks}" for row in rows if row.fallbacks]
    if fallbacks:
        lines.append(f"Queries that fell back to dense: {', '.join(fallbacks)}.")
    answered = [f"{row.pipeline} {row.replayed}" for row in rows if row.replayed]
    if answered:
        lines.append(f"Queries a controller answered without the model: {', '.join(answered)}.")
    if note:
        lines.append(note)
    return "\n".join(lines)
