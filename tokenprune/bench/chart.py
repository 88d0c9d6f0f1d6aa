"""Draws latency against kept tokens, a panel per backbone, with what FLOPs alone promise and what the device allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokenprune.bench.result import BenchResult, CaseResult
from tokenprune.errors import ResultError
from tokenprune.viz.frame import FAINT, INK, MARK, plain, point_handle, write_chart, write_legend, write_title
from tokenprune.viz.labels import DPI, label_points

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_WIDTH, _PANEL, _ABOVE = 1200, 600, 45


def write_speed(result: BenchResult, path: Path) -> None:
    """Write the chart of a result of `bench`; an existing file is replaced.

    Args:
        result: What `bench` measured.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is not one of `FORMATS`, there is nothing to draw, or the file cannot be written.
    """
    write_chart(lambda: draw_speed(result), path)


def draw_speed(result: BenchResult) -> Figure:
    """Return a chart with a panel per backbone and preset, and a colour per dtype and mode.

    Raises:
        ResultError: If nothing has been measured.
    """
    panels: dict[tuple[str, str], list[CaseResult]] = {}
    for case in result.results:
        panels.setdefault((case.backbone.name, case.preset), []).append(case)
    if not panels:
        raise ResultError("there is nothing to draw: no pipeline has been measured")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = _ABOVE + lines * _PANEL
    figure = Figure(figsize=(_WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    series = list(dict.fromkeys(_series(case) for case in result.results))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(series)}
    for number, ((name, preset), cases) in enumerate(panels.items()):
        line, column = divmod(number, columns)
        width = 1 / columns
        axes = figure.add_axes(
            (
                (column + 0.075 * columns) * width,
                1 - (_ABOVE + (line + 1) * _PANEL - 62) / height,
                width - 0.09,
                (_PANEL - 105) / height,
            )
        )
        axes.set_title(f"{name} {preset}", fontsize=11, color=INK, loc="left")
        _panel(axes, canvas, cases, [colours[_series(case)] for case in cases])
    top = 1 - 28 / height
    write_title(figure, 0.02, top, "Latency of a query and visual tokens held")
    handles = [point_handle(colour, name) for name, colour in colours.items()]
    handles.append(Line2D([], [], linestyle="-", color=FAINT, label="dense time x share of its FLOPs"))
    handles.append(Line2D([], [], linestyle=":", color=FAINT, label="floor of this device"))
    write_legend(figure, handles, top, gap=0.5)
    return figure


def _series(case: CaseResult) -> str:
    return f"{case.dtype}, {case.mode}"


def _panel(axes: Axes, canvas: FigureCanvasAgg, cases: Sequence[CaseResult], colours: Sequence[str]) -> None:
    points, names, tints = [], [], []
    for case, colour in zip(cases, colours, strict=True):
        rows, curve = case.rows, case.curve
        tokens = [point.tokens for point in curve]
        promised = [rows[0].median_ms * point.gflops / curve[-1].gflops for point in curve]
        axes.plot(tokens, promised, "-", color=colour, linewidth=1.1, alpha=0.6)
        axes.plot(tokens, [point.floor_ms for point in curve], ":", color=colour, linewidth=1.4)
        for row in rows:
            points.append((row.tokens_mean, row.median_ms))
            names.append(row.pipeline)
            tints.append(colour)
            axes.plot(*points[-1], "o", color=colour, markersize=MARK, zorder=3)
    widest = max(x for x, _ in points)
    axes.set(xlim=(0, 1.08 * widest), ylim=(0, 1.12 * max(y for _, y in points)))
    axes.set_xlabel("visual tokens held, mean over layers", fontsize=10, color=FAINT)
    axes.set_ylabel("median query (ms)", fontsize=10, color=FAINT)
    plain(axes)
    label_points(axes, canvas, points, names, tints)
