"""Draws one query: the camera pictures, tokens per layer, and its place in the episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from tokenprune.viz.paint import greyed, paint, veil
from tokenprune.viz.palette import MEANING, MODES, Colour, reason_colours
from tokenprune.viz.result import QueryResult, Result

Image = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 1200, 700
_MARGIN, _GAP = 18, 14
_VIEWS_TOP = 94
_MAX_SIDE, _COLUMN, _BARS = 400, 280, 150
_LINE = 19
_MAX_CUTS = 6
_INK, _FAINT, _ALARM = "#222222", "#666666", "#a33c00"
_VISUAL, _FIXED = (86, 119, 156), (185, 185, 185)


class Page:
    """A picture in pixel coordinates; the origin is its upper left corner."""

    def __init__(self) -> None:
        """Make an empty white page."""
        self.figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self._marks = self.axes(0, 0, WIDTH, HEIGHT)
        self._marks.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self._marks.axis("off")
        self._pasted: list[tuple[int, int, Image]] = []

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes over a rectangle of the page."""
        return self.figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))

    def paste(self, image: Image, left: int, top: int) -> None:
        """Put an image on the page without resampling."""
        self._pasted.append((left, top, image))

    def text(
        self,
        left: float,
        top: float,
        text: str,
        width: float,
        *,
        size: float = 10,
        colour: str = _INK,
        bold: bool = False,
        align: Literal["left", "right"] = "left",
    ) -> float:
        """Write one line, shortened with an ellipsis to fit `width`; return the width it takes."""
        shown = self._marks.text(
            left, top, text, fontsize=size, color=colour, ha=align, va="center",
            fontweight="bold" if bold else "normal", parse_math=False,
        )  # fmt: skip
        while (taken := self._width(shown)) > width and text:
            text = text[: min(len(text) - 1, int(len(text) * width / taken))].rstrip()
            shown.set_text(text + "…")
        return taken

    def box(self, left: float, top: float, side: float, face: Colour | None, edge: Colour | None) -> None:
        """Draw a small square in the style of a patch."""
        mark = Rectangle((left, top), side, side, linewidth=2 if edge else 0)
        mark.set_facecolor(_unit(face) if face else "none")
        mark.set_edgecolor(_unit(edge) if edge else "none")
        self._marks.add_patch(mark)

    def pixels(self) -> Image:
        """Return the finished page, RGB `[HEIGHT, WIDTH, 3]`."""
        self.canvas.draw()  # type: ignore[no-untyped-call]
        page = np.array(self.canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
        for left, top, image in self._pasted:
            page[top : top + image.shape[0], left : left + image.shape[1]] = image
        return page

    def _width(self, text: Text) -> float:
        renderer = self.canvas.get_renderer()  # type: ignore[no-untyped-call]
        return float(text.get_window_extent(renderer).width)


def draw_query(result: Result, index: int, pixels: Mapping[str, Image], speed: npt.NDArray[np.floating]) -> Image:
    """Draw what one query kept and why.

    Args:
        result: The run it belongs to.
        index: Number of the query, from 0.
        pixels: The policy's image of each view, RGB `[H, W, 3]`.
        speed: Length of each control step's translation, `[T]`; empty where it is not known.

    Returns:
        RGB `[HEIGHT, WIDTH, 3]`.
    """
    query = result.queries[index]
    colours = reason_colours(result.reason_names)
    page = Page()
    _title(page, result, index)
    views = [view for view in result.views if view.name in pixels]
    side = min(_MAX_SIDE, (WIDTH - 2 * _MARGIN - _COLUMN - _GAP * len(views)) // max(1, len(views)))
    for number, view in enumerate(views):
        left = _MARGIN + number * (side + _GAP)
        kept = sum(token not in query.lost for token in view.span)
        caption = f"{kept} of {view.length} patches kept" if view.prunable else "never pruned"
        caption += "" if view.grid else ", no grid"
        page.text(left, _VIEWS_TOP - 11, f"{view.name}: {caption}", side, bold=True)
        page.paste(paint(pixels[view.name], side, view, query, colours), left, _VIEWS_TOP)
    column = _MARGIN + len(views) * (side + _GAP) + 6
    below = _legend(page, result, query, colours, column, WIDTH - _MARGIN - column)
    bottom = max(_VIEWS_TOP + side, below + _BARS)
    _layers(page, result, query, column, below, bottom)
    _episode(page, result, index, speed, bottom + 54)
    return page.pixels()


def _title(page: Page, result: Result, index: int) -> None:
    query, width = result.queries[index], WIDTH - 2 * _MARGIN
    taken = 0.0
    if result.untrained:
        taken = _GAP + page.text(
            WIDTH - _MARGIN, 20, "untrained random weights", width, size=12, colour=_ALARM, bold=True, align="right"
        )
    at = _MARGIN + page.text(_MARGIN, 20, result.label, 430, size=14, bold=True)
    at += 9 + page.text(at + 9, 20, f"step {query.step}, mode {query.mode}", 330, size=14)
    model = f"on {result.backbone} {result.source}"
    page.text(at + 18, 20, model, WIDTH - _MARGIN - taken - at - 18, size=11, colour=_FAINT)
    page.text(_MARGIN, 43, f"“{result.instruction}”", width, size=11)
    notes = [f"query {index} (0 to {len(result.queries) - 1})"]
    notes += [f"{stage} compared frames {steps} steps apart" for stage, steps in query.looked_back.items()]
    if query.fallback:
        notes = [f"ran without pruning: {query.fallback}"]
    page.text(_MARGIN, 63, "; ".join(notes), width, size=9.5, colour=_ALARM if query.fallback else _FAINT)


def _legend(
    page: Page, result: Result, query: QueryResult, colours: Mapping[str, Colour], left: float, width: float
) -> float:
    """Write counts by reason and by cut; return the lower end, which is the same for every query of a run."""
    visual = [token for view in result.views if view.prunable for token in view.span]
    top = float(_VIEWS_TOP - 11)
    page.text(left, top, f"kept to the end: {len(visual) - len(query.lost)} of {len(visual)}", width, bold=True)
    counts = Counter(query.reasons.values())
    for name, colour in colours.items():
        top += _LINE
        page.box(left + 1, top - 6, 12, None, colour)
        _entry(page, left, top, width, name, MEANING.get(name, ""), counts[name])
    top += _LINE + 5
    end = top + _LINE * (1 + max(min(len(q.cuts), _MAX_CUTS) for q in result.queries))
    page.text(left, top, f"cut: {len(query.lost)}" if query.cuts else "no cuts", width, bold=True)
    gone = Counter(query.lost.values())
    shown: list[tuple[int, ...]] = [(index,) for index in range(len(query.cuts))]
    if len(shown) > _MAX_CUTS:
        shown[2:-2] = [tuple(range(2, len(query.cuts) - 2))]
    for group in shown:
        top += _LINE
        shade = greyed(np.full((1, 1, 3), 60, np.uint8), veil(group[len(group) // 2], len(query.cuts)))[0, 0]
        page.box(left, top - 7, 14, (int(shade[0]), int(shade[1]), int(shade[2])), None)
        _entry(page, left, top, width, _cut_label(query, group), "", sum(gone[index] for index in group))
    return end


def _cut_label(query: QueryResult, group: tuple[int, ...]) -> str:
    if len(group) > 1:
        return f"at {len(group)} cuts between"
    name = query.cuts[group[0]]
    return "before layer 0" if name == "embedding" else f"after layer {name}"


def _entry(page: Page, left: float, top: float, width: float, name: str, meaning: str, count: int) -> None:
    page.text(left + 48, top, str(count), 40, align="right")
    taken = page.text(left + 56, top, name, width - 56)
    if meaning and width - 62 - taken > 60:
        page.text(left + 62 + taken, top, meaning, width - 62 - taken, size=8.5, colour=_FAINT)


def _layers(page: Page, result: Result, query: QueryResult, left: float, top: float, bottom: float) -> None:
    """Draw the tokens that each layer held; visual tokens on top of those that no stage may drop."""
    axes = page.axes(left + 40, top + 22, WIDTH - _MARGIN - left - 40, bottom - top - 22)
    held, layers = np.array(query.held), np.arange(len(query.held))
    fixed = np.minimum(held, result.n_fixed)
    axes.bar(layers, fixed, 0.82, color=_unit(_FIXED))
    axes.bar(layers, held - fixed, 0.82, bottom=fixed, color=_unit(_VISUAL))
    axes.axhline(result.n_tokens, color=_INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set(xlim=(-0.6, len(layers) - 0.4), ylim=(0, max(result.n_tokens, held.max()) * 1.2))
    axes.text(
        1, result.n_tokens * 1.02, f"dense {result.n_tokens}", fontsize=8.5, color=_FAINT, ha="right", va="bottom",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    _plain(axes)
    page.text(left, bottom + 13, "layer", 60, size=8.5, colour=_FAINT)
    at = left + 14 + page.text(left, top + 8, "tokens per layer", 200, bold=True)
    for name, colour in (("visual", _VISUAL), ("fixed", _FIXED)):
        page.box(at, top + 2, 12, colour, None)
        at += 29 + page.text(at + 17, top + 8, name, 90, size=9)


def _episode(page: Page, result: Result, index: int, speed: npt.NDArray[np.floating], top: float) -> None:
    """Draw the end effector's speed over the episode, the modes of the queries, and the current query."""
    axes = page.axes(_MARGIN + 40, top, WIDTH - 2 * _MARGIN - 40, HEIGHT - top - 40)
    shades = {mode: MODES[n % len(MODES)] for n, mode in enumerate(result.modes)}
    ends = [query.step for query in result.queries[1:]] + [result.queries[-1].step + result.horizon]
    length = len(speed) or ends[-1]
    for query, end in zip(result.queries, ends, strict=True):
        axes.axvspan(query.step, end, color=_unit(shades[query.mode]), linewidth=0)
    here = result.queries[index].step
    axes.axvspan(here, ends[index], facecolor="none", edgecolor=_ALARM, linewidth=1.5)
    axes.plot(here, 1, "v", color=_ALARM, markersize=9, clip_on=False, transform=axes.get_xaxis_transform(), zorder=5)
    axes.axvline(here, color=_ALARM, linewidth=2.5)
    if len(speed):
        axes.plot(np.arange(len(speed)), speed, color=_INK, linewidth=1.2)
    axes.set(xlim=(0, length), ylim=(0, 1.12 * float(speed.max(initial=0)) or 1))
    _plain(axes)
    if not len(speed):
        axes.set_yticks([])
    caption = "end-effector speed: |translation| of each recorded action" if len(speed) else "modes"
    at = _MARGIN + 14 + page.text(_MARGIN, top - 18, caption, 500, bold=True)
    room = (WIDTH - _MARGIN - at) / len(shades)
    for mode, shade in shades.items():
        page.box(at, top - 24, 12, shade, None)
        at += 34 + page.text(at + 17, top - 18, mode, room - 34, size=9)
    page.text(WIDTH - _MARGIN, HEIGHT - 12, "control step", 100, size=9, colour=_FAINT, align="right")


def _plain(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8.5, colors=_FAINT, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)


def _unit(colour: Colour) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
