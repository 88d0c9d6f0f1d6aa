"""A closed-loop evaluation as tables and sentences of at most 79 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.markup import escape

from tokenprune.evaluation.statistics import ALPHA
from tokenprune.report.text import milliseconds, result_table, wrap_label

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.evaluation.summary import Summary, VariantRow

WIDTH = 79
_NAME = 20
_TASK = 5
_NONE = "-"


def eval_table(summary: Summary) -> Table:
    """Return a table with one line per variant, over everything; `eval_legend` explains the columns."""
    table = result_table(
        "\nvariant", "succ\n%", "\n95 %", "diff\npts", "\np", "steps\n/eps", "qry\n/eps", "ms\np50", "speed\nup",
        "FLOP\nratio", "tok\nmean", min_width=_NAME, max_width=_NAME,
    )  # fmt: skip
    for row in summary.at():
        pair = row.paired if row.paired is not None and row.paired.n else None
        table.add_row(
            escape(wrap_label(row.variant, _NAME)),
            _percent(row.success_share),
            f"{100 * row.success_low:.0f}-{100 * row.success_high:.0f}",
            _percent(None if pair is None else pair.difference, sign="+"),
            _NONE if pair is None else _p(pair.p),
            _number(row.steps_per_episode, 0),
            _number(row.queries_per_episode, 1),
            _NONE if row.query_ms_p50 is None else milliseconds(row.query_ms_p50),
            _number(row.speedup, 2),
            _number(row.flop_ratio, 2),
            _number(row.tokens_mean, 0),
        )
    return table


def success_tables(summary: Summary) -> list[Table]:
    """Return tables of success by task: one per environment, or more where its tasks do not fit one table."""
    tables = []
    fitting = (WIDTH - _NAME - _TASK) // _TASK
    for environment, tasks in summary.tasks().items():
        whole = summary.at(environment)
        for first in range(0, len(tasks), fitting):
            shown = tasks[first : first + fitting]
            table = result_table(f"{environment}\nsuccess %, task", min_width=_NAME, max_width=_NAME)
            columns = [summary.at(environment, task) for task in shown] + [whole]
            for name in [*map(str, shown), "all"]:
                table.add_column(f"\n{name}", justify="right", no_wrap=True, min_width=_TASK - 1)
            for variant, *cells in zip([row.variant for row in whole], *columns, strict=True):
                shares = (_number(row.success_share, 0, 100) for row in cells)
                table.add_row(escape(wrap_label(variant, _NAME)), *shares)
            tables.append(table)
    return tables


def verdict_lines(summary: Summary) -> str:
    """Return what the pairs show of each variant beside the baseline; empty where nothing is compared."""
    verdicts = [f"{row.variant}: {row.verdict}." for row in summary.at() if row.verdict is not None]
    lines = [line for text in verdicts for line in _wrapped(text)]
    return "\n".join([f"Against {summary.baseline}, on the same starts:", *lines]) if lines else ""


def eval_legend(summary: Summary) -> str:
    """Return what the columns mean, what is unfinished, and what the numbers do not show."""
    rows = summary.at()
    texts = [
        "95 %: Wilson interval of the success. diff, p: percentage points against the baseline on the starts both "
        "finished, and McNemar's exact test. steps, qry: control steps and queries per episode. ms: the whole "
        "query, observation to actions. speed up, FLOP ratio: the baseline's over its own, per query, on the same "
        "starts. tok: visual tokens held, mean over layers and queries."
    ]
    compared = sum(row.paired is not None for row in rows)
    if compared > 1:
        texts.append(
            f"p is not corrected for {compared} comparisons: of twenty variants that change nothing, one may well show "
            f"p < {ALPHA:g}. A p below {ALPHA / compared:.2g} stands after Bonferroni's correction."
        )
    texts += _counted(rows, "fallbacks", "Queries that fell back to dense")
    texts += _counted(rows, "crashes", "Simulators restarted")
    return "\n".join(line for text in (*texts, *summary.notes) for line in _wrapped(text))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _counted(rows: tuple[VariantRow, ...], name: str, meaning: str) -> list[str]:
    counted = [f"{row.variant} {count}" for row in rows if (count := getattr(row, name))]
    return [f"{meaning}: {', '.join(counted)}."] if counted else []


def _percent(share: float | None, sign: str = "") -> str:
    """Return percent to a tenth, at most five characters and a sign."""
    digits = 1 if share is None or abs(share) < 0.9995 else 0
    return _number(share, digits, 100, sign)


def _number(value: float | None, digits: int, scale: float = 1, sign: str = "") -> str:
    return _NONE if value is None else f"{scale * value:{sign}.{digits}f}"


def _p(p: float) -> str:
    return "<.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"
