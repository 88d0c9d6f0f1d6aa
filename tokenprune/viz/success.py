"""Draws success against latency, one labelled point per variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokenprune.errors import ResultError
from tokenprune.rollout.statistics import ALPHA

if TYPE_CHECKING:
    from tokenprune.rollout.summary import Row, Summary

Array = npt.NDArray[Any]

FORMATS = (".png", ".svg")
_WIDTH, _HEIGHT, _DPI = 1200, 750, 100
_INK, _FAINT = "#222222", "#666666"
_UNSEEN, _SEEN = "#0072b2", "#d55e00"
_MARK = 6
_REACH = _MARK / 2 * _DPI / 72 + 1
_RINGS, _RING, _TURNS, _SWEEPS = 45, 9, 24, 4
_BESIDE, _NEARER, _BAR, _ALONG, _CROSSED, _HIDDEN, _OUTSIDE = 14.0, 4.0, 15.0, 60.0, 40.0, 1e4, 1e6


def write_success(summary: Summary, path: Path) -> None:
    """Write the chart; a file of that name is replaced, and equal summaries give equal files.

    Args:
        summary: What to draw, over all environments.
        path: Ends in `.png` or `.svg`.

    Raises:
        ResultError: If the ending is another one, there is nothing to draw, or the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise ResultError(f"cannot draw '{path}': its ending is '{path.suffix}'; valid: {', '.join(FORMATS)}")
    figure = draw_success(summary)
    # Text stays text, so that labels can be searched for and edited.
    with rc_context({"svg.hashsalt": "tokenprune", "svg.fonttype": "none"}):
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error.strerror or error}") from error


def draw_success(summary: Summary) -> Figure:
    """Success with Wilson's 95 % interval against the median latency of a query, over all environments.

    Raises:
        ResultError: If no variant has finished an episode.
    """
    rows = [row for row in summary.at() if row.success_share is not None and row.query_ms_p50 is not None]
    if not rows:
        raise ResultError("there is nothing to draw: no variant has finished an episode")
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.065, 0.085, 0.915, 0.815))
    colours = [_colour(row, summary.baseline) for row in rows]
    for row, colour in zip(rows, colours, strict=True):
        x, y = _point(row)
        axes.vlines(x, 100 * row.success_low, 100 * row.success_high, color=colour, alpha=0.45, linewidth=1.4)
        axes.plot(x, y, "o", color=colour, markersize=_MARK, zorder=3)
    _frame(axes, rows)
    figure.text(
        0.065,
        0.96,
        "Success (95 % Wilson interval) and latency",
        fontsize=12,
        va="center",
        color=_INK,
        fontweight="bold",
    )
    _key(figure, summary.baseline, set(colours))
    _label(axes, rows, colours, canvas)
    return figure


def _point(row: Row) -> tuple[float, float]:
    if row.success_share is None or row.query_ms_p50 is None:
        raise ValueError(f"'{row.variant}' has no episode")
    return row.query_ms_p50, 100 * row.success_share


def _colour(row: Row, baseline: str | None) -> str:
    if row.variant == baseline:
        return _INK
    return _SEEN if row.paired is not None and row.paired.p < ALPHA else _UNSEEN


def _frame(axes: Axes, rows: list[Row]) -> None:
    """Limits with room for labels, and axes as plain as those of the other pictures."""
    xs = [_point(row)[0] for row in rows]
    room = 0.12 * (max(xs) - min(xs)) or 0.2 * xs[0]
    low = 100 * min(row.success_low for row in rows)
    high = 100 * max(row.success_high for row in rows)
    axes.set(
        xlim=(max(0, min(xs) - room), max(xs) + room),
        ylim=(max(-5, low - 0.1 * (high - low)), min(112, high + 0.15 * (high - low))),
    )
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100 and tick > axes.get_ylim()[0]])
    axes.set_xlabel("median query (ms)", fontsize=10, color=_FAINT)
    axes.set_ylabel("success (%)", fontsize=10, color=_FAINT)
    axes.tick_params(labelsize=9, colors=_FAINT, length=3)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)


def _key(figure: Figure, baseline: str | None, used: set[str]) -> None:
    """What the colours say."""
    if baseline is None:
        return
    meaning = {
        _INK: baseline,
        _UNSEEN: f"no difference from {baseline} seen",
        _SEEN: f"differs from {baseline}, p < {ALPHA:g}",
    }
    marks = {said: colour for colour, said in meaning.items() if colour in used}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=_MARK, label=said)
        for said, colour in marks.items()
    ]
    key = figure.legend(
        handles=handles, loc="center right", bbox_to_anchor=(0.985, 0.96), ncols=3, frameon=False, fontsize=9.5,
        labelcolor=_INK, borderpad=0, handletextpad=0.2,
    )  # fmt: skip
    for text in key.get_texts():
        text.set_parse_math(False)


def _label(axes: Axes, rows: list[Row], colours: list[str], canvas: FigureCanvasAgg) -> None:
    """Write each variant's name where there is room near its point, with a line to it where they lie apart."""
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    to_data = axes.transData.inverted()
    names = [
        axes.text(0, 0, row.variant, fontsize=9.5, color=colour, ha="center", va="center", parse_math=False, zorder=4)
        for row, colour in zip(rows, colours, strict=True)
    ]
    extents = [name.get_window_extent(renderer) for name in names]
    halves = np.array([(extent.width / 2 + 2, extent.height / 2) for extent in extents])
    dots = axes.transData.transform([_point(row) for row in rows])
    ends = [axes.transData.transform([(0, 100 * row.success_low), (0, 100 * row.success_high)])[:, 1] for row in rows]
    bars = np.array([(x - 1, low, x + 1, high) for (x, _), (low, high) in zip(dots, ends, strict=True)])
    boxes = place(dots, halves, bars, np.array(axes.get_window_extent(renderer).extents))
    for name, dot, box, colour in zip(names, dots, boxes, colours, strict=True):
        x, y = to_data.transform((box[:2] + box[2:]) / 2)
        name.set_position((x, y))
        tip = np.clip(dot, box[:2], box[2:])
        if np.linalg.norm(tip - dot) > _BESIDE:
            (x0, y0), (x1, y1) = to_data.transform([dot, tip])
            axes.plot((x0, x1), (y0, y1), color=colour, linewidth=0.7, alpha=0.6, zorder=2)


def place(dots: Array, halves: Array, bars: Array, frame: Array) -> Array:
    """Places for labels, in pixels: near their points, within the frame, and over no point and no other label.

    Places on widening rings are weighed, label by label, several times over: what lies further away, nearer to another
    point than to its own, over an interval, or across another label's line costs more, and so does a line that runs
    along an interval. Only in a chart too small for its labels may one be left to touch another or a point.

    Args:
        dots: Points, `[N, 2]`.
        halves: Half the width and height of each label, `[N, 2]`.
        bars: Boxes of the intervals, `[N, 4]`: left, bottom, right, top.
        frame: Box that no label may leave, `[4]`.

    Returns:
        A box for each label, `[N, 4]`.
    """
    turns = np.arange(_TURNS) * 2 * np.pi / _TURNS
    away = np.repeat(_REACH + 2 + _RING * np.arange(_RINGS), _TURNS)
    directions = np.tile(np.stack([np.cos(turns), np.sin(turns)], axis=1), (_RINGS, 1))
    solid = np.concatenate([dots - _REACH, dots + _REACH], axis=1)
    labels = np.full((len(dots), 4), np.inf)
    tips = dots.copy()
    for index in list(range(len(dots))) * _SWEEPS:
        dot, half = dots[index], halves[index]
        centres = dot + directions * (half + away[:, None])
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        near = np.clip(dot, boxes[:, :2], boxes[:, 2:])
        others = np.arange(len(dots)) != index
        placed = others & np.isfinite(labels[:, 0])
        told, lines = labels[placed], (dots[placed], tips[placed])
        apart = np.linalg.norm(np.clip(dots[None], boxes[:, None, :2], boxes[:, None, 2:]) - dots, axis=-1)
        nearer = (apart[:, others] < np.linalg.norm(near - dot, axis=1)[:, None] + _REACH).sum(1)
        outside = (boxes[:, :2] < frame[:2]).any(1) | (boxes[:, 2:] > frame[2:]).any(1)
        in_the_way, crossed = np.concatenate([told, solid[others]]), _cross((dot, near), lines)
        for corner, opposite in (((0, 1), (2, 3)), ((0, 3), (2, 1))):
            crossed += 2 * _cross((dot, near), (in_the_way[:, corner], in_the_way[:, opposite]))
            crossed += 2 * _cross((boxes[:, corner], boxes[:, opposite]), lines)
        cost = away + _NEARER * nearer + _BAR * _touch(boxes, bars) + _CROSSED * crossed
        cost += _ALONG * ((np.abs((near - dot)[:, 0]) < 0.5 * away) & (away > _BESIDE))
        cost += _HIDDEN * (_touch(boxes, solid) + _touch(boxes, told)) + _OUTSIDE * outside
        best = int(cost.argmin())
        labels[index], tips[index] = boxes[best], near[best]
    return labels


def _touch(boxes: Array, others: Array) -> Array:
    """How many of the others `[N, 4]` each box `[P, 4]` overlaps."""
    own = boxes[:, None]
    overlap = (own[..., :2] < others[:, 2:]) & (others[:, :2] < own[..., 2:])
    return np.asarray(overlap.all(-1).sum(1))


def _cross(lines: tuple[Array, Array], others: tuple[Array, Array]) -> Array:
    """How many of the other lines each line crosses; both are their two ends `[P, 2]`."""
    (a, b), (c, d) = ([np.broadcast_to(end, lines[1].shape)[:, None] for end in lines], others)
    return np.asarray(((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).sum(1))


def _side(start: Array, end: Array, point: Array) -> Array:
    """On which side of a line a point lies: the sign of the cross product."""
    along, across = end - start, point - start
    return np.asarray(along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0])
