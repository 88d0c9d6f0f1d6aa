"""Places labels beside the points of a chart, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tokenprune.viz.frame import MARK

Array = npt.NDArray[Any]

DPI = 100
_REACH = MARK / 2 * DPI / 72 + 1
_RINGS, _RING, _TURNS, _SWEEPS = 45, 9, 24, 4
_BESIDE, _NEARER, _BAR, _ALONG, _CROSSED, _HIDDEN, _OUTSIDE = 14.0, 4.0, 15.0, 60.0, 40.0, 1e4, 1e6


def label_points(
    axes: Axes,
    canvas: FigureCanvasAgg,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    colours: Sequence[str],
    intervals: Sequence[tuple[float, float]] = (),
) -> None:
    """Write the name of each point where there is room near it, with a line to the point where they lie apart.

    Args:
        axes: With their final limits.
        canvas: The figure's.
        points: In data coordinates.
        names: One each.
        colours: One each.
        intervals: Lower and upper end of the vertical interval through each point, if there are intervals.
    """
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    to_data = axes.transData.inverted()
    texts = [
        axes.text(0, 0, name, fontsize=9.5, color=colour, ha="center", va="center", parse_math=False, zorder=4)
        for name, colour in zip(names, colours, strict=True)
    ]
    extents = [text.get_window_extent(renderer) for text in texts]
    halves = np.array([(extent.width / 2 + 2, extent.height / 2) for extent in extents])
    dots = axes.transData.transform(points)
    ends = [axes.transData.transform([(0, low), (0, high)])[:, 1] for low, high in intervals]
    bars = np.array([(x - 1, low, x + 1, high) for (x, _), (low, high) in zip(dots, ends, strict=bool(intervals))])
    boxes = place(dots, halves, bars.reshape(-1, 4), np.array(axes.get_window_extent(renderer).extents))
    for text, dot, box, colour in zip(texts, dots, boxes, colours, strict=True):
        x, y = to_data.transform((box[:2] + box[2:]) / 2)
        text.set_position((x, y))
        tip = np.clip(dot, box[:2], box[2:])
        if np.linalg.norm(tip - dot) > _BESIDE:
            (x0, y0), (x1, y1) = to_data.transform([dot, tip])
            axes.plot((x0, x1), (y0, y1), color=colour, linewidth=0.7, alpha=0.6, zorder=2)


def place(dots: Array, halves: Array, bars: Array, frame: Array) -> Array:
    """Return boxes for labels, in pixels: near their points, within the frame, and over no point and no other label.

    Each label in turn takes the cheapest place on rings around its point, in several sweeps over all labels. A place
    costs more that is further away, nearer to another point than to its own, over an interval, or across the line of
    another label; so does a line that runs along an interval. Labels touch each other or a point only in a chart that
    is too small for them.

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
        taken, lines = labels[placed], (dots[placed], tips[placed])
        apart = np.linalg.norm(np.clip(dots[None], boxes[:, None, :2], boxes[:, None, 2:]) - dots, axis=-1)
        nearer = (apart[:, others] < np.linalg.norm(near - dot, axis=1)[:, None] + _REACH).sum(1)
        outside = (boxes[:, :2] < frame[:2]).any(1) | (boxes[:, 2:] > frame[2:]).any(1)
        in_the_way, crossed = np.concatenate([taken, solid[others]]), _cross((dot, near), lines)
        for corner, opposite in (((0, 1), (2, 3)), ((0, 3), (2, 1))):
            crossed += 2 * _cross((dot, near), (in_the_way[:, corner], in_the_way[:, opposite]))
            crossed += 2 * _cross((boxes[:, corner], boxes[:, opposite]), lines)
        cost = away + _NEARER * nearer + _BAR * _touch(boxes, bars) + _CROSSED * crossed
        cost += _ALONG * ((np.abs((near - dot)[:, 0]) < 0.5 * away) & (away > _BESIDE))
        cost += _HIDDEN * (_touch(boxes, solid) + _touch(boxes, taken)) + _OUTSIDE * outside
        best = int(cost.argmin())
        labels[index], tips[index] = boxes[best], near[best]
    return labels


def _touch(boxes: Array, others: Array) -> Array:
    """Return how many of the others `[N, 4]` each box `[P, 4]` overlaps."""
    own = boxes[:, None]
    overlap = (own[..., :2] < others[:, 2:]) & (others[:, :2] < own[..., 2:])
    return np.asarray(overlap.all(-1).sum(1))


def _cross(lines: tuple[Array, Array], others: tuple[Array, Array]) -> Array:
    """Return how many of the other lines each line crosses; a line is its two ends `[P, 2]`."""
    (a, b), (c, d) = ([np.broadcast_to(end, lines[1].shape)[:, None] for end in lines], others)
    return np.asarray(((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).sum(1))


def _side(start: Array, end: Array, point: Array) -> Array:
    """Return on which side of a line a point lies, as the sign of the cross product."""
    along, across = end - start, point - start
    return np.asarray(along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0])
