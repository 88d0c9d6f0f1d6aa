"""A comparison as tables that fit 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from tokenprune.report.text import NAME_WIDTH, broken, milliseconds

if TYPE_CHECKING:
    from tokenprune.compare.row import Row


def compare_table(rows: tuple[Row, ...]) -> Table:
    """One line per pipeline; the legend below the table explains the columns."""
    groups = tuple(name for name in rows[0].error if name != "gripper")
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("\npipeline", overflow="fold", min_width=NAME_WIDTH)
    for heading in (
        "tokens\nmean", "\nlast", "FLOP\nG", "\nratio", "ms\np50", "\np95", "speed\nup", "\neff", "sel\n%",
        *(f"{'' if i else 'L1'}\n{name[:4]}" for i, name in enumerate(groups)), "grip\nflip",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            broken(row.pipeline),
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


def phase_table(rows: tuple[Row, ...], follow_up: str | None) -> Table:
    """Where the time of a query goes, and what pruning gained in the decoder alone.

    Args:
        rows: One line each.
        follow_up: Name of the phase after the layout's tokens, if the backbone has one; the decoder's first pass is
            then called prefill.
    """
    decoder = "decoder" if follow_up is None else "prefill"
    named = ("vision", "selection", "decoder", *(() if follow_up is None else (follow_up,)), "head")
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("ms p50\nby phase", overflow="fold", min_width=12)
    for phase in (*named, "other"):
        shown = {"decoder": decoder, "selection": "select"}.get(phase, phase)
        table.add_column(f"\n{shown}", justify="right", no_wrap=True)
    for heading in (f"{decoder}\nspeedup", "FLOP\nratio", "\neff"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rest = sum(ms for phase, ms in row.phases.items() if phase not in named)
        gain = row.prefill
        table.add_row(
            broken(row.pipeline),
            *(milliseconds(row.phases.get(phase, 0.0)) for phase in named),
            milliseconds(rest),
            *(f"{value:.2f}" for value in (gain.speedup, gain.flop_ratio, gain.efficiency)),
        )
    return table


def compare_legend(rows: tuple[Row, ...], note: str) -> str:
    """What the columns mean, and what the numbers do not say."""
    lines = [
        "tokens: visual tokens held, mean over layers and at the last one. ms: the whole",
        "query, observation to actions. speed up: dense over own time, query by query,",
        "median. eff: speed up / FLOP ratio. sel: choosing, moving and remembering",
        "tokens, % of dense time. L1 and gripper flips: against dense, over",
        f"{rows[0].actions} actions. By phase: select and the decoder's gain count choosing; other is",
        "preprocessing and memory.",
    ]
    fallen = [f"{row.pipeline} {row.fallbacks}" for row in rows if row.fallbacks]
    if fallen:
        lines.append(f"Queries that fell back to dense: {', '.join(fallen)}.")
    answered = [f"{row.pipeline} {row.replayed}" for row in rows if row.replayed]
    if answered:
        lines.append(f"Queries a controller answered without the model: {', '.join(answered)}.")
    if note:
        lines.append(note)
    return "\n".join(lines)
