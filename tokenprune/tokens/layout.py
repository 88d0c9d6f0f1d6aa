"""The tokens of one query in original order: what each is for, its view, and whether it may be pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from tokenprune.errors import LayoutError, nearest


class Role(StrEnum):
    """What a run of tokens is for."""

    BOS = "bos"
    VISION = "vision"
    PROPRIO = "proprio"
    STATE = "state"
    TEXT = "text"
    ACTION = "action"
    STOP = "stop"
    PAD = "pad"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one role.

    Attributes:
        role: What the tokens are for.
        start: Original index of the first token.
        length: Number of tokens.
        view: Camera name, for vision segments only.
        grid: `(rows, cols)` of the view's patches in raster order; `rows * cols == length`.
        prunable: Whether stages may drop these tokens; vision only.
    """

    role: Role
    start: int
    length: int
    view: str | None = None
    grid: tuple[int, int] | None = None
    prunable: bool = False

    def __post_init__(self) -> None:
        """Check the segment on its own."""
        if self.length < 0 or self.start < 0:
            raise LayoutError(
                f"segment '{self.role}' has start {self.start} and length {self.length}; both must be >= 0"
            )
        if (self.role is Role.VISION) != (self.view is not None):
            raise LayoutError(
                f"segment '{self.role}' at {self.start}: a view name belongs to vision segments, and only there"
            )
        if self.prunable and self.role is not Role.VISION:
            raise LayoutError(f"segment '{self.role}' at {self.start} cannot be prunable; only vision segments can")
        if self.grid is not None and (min(self.grid) < 0 or self.grid[0] * self.grid[1] != self.length):
            raise LayoutError(f"view '{self.view}': grid {self.grid} does not hold {self.length} tokens")

    @property
    def span(self) -> range:
        """Original indices of the segment."""
        return range(self.start, self.start + self.length)


@dataclass(frozen=True)
class TokenLayout:
    """All segments of one query in original order; host integers only, hashable.

    Segments are contiguous, disjoint and cover `[0, n_tokens)`. `rows` names spans that stages and the
    engine look up by name: `text`, `instruction`, `action`, and `readout` (the positions whose hidden
    states are read at the end; empty if only keys and values are read). Named rows are never prunable.

    Raises:
        LayoutError: If segments leave a gap, overlap, repeat a view, or a named row is out of range or prunable.
    """

    segments: tuple[Segment, ...]
    rows: tuple[tuple[str, range], ...] = ()

    def __post_init__(self) -> None:
        """Check that segments tile the sequence and that rows name tokens that stay."""
        at = 0
        for segment in self.segments:
            if segment.start != at:
                raise LayoutError(
                    f"segment '{segment.role}' starts at {segment.start}, but the one before it ends at {at}"
                )
            at += segment.length
        views = [s.view for s in self.segments if s.view is not None]
        if len(set(views)) != len(views):
            raise LayoutError(f"views must have distinct names, got {views}")
        prunable = {i for s in self.segments if s.prunable for i in s.span}
        names = [name for name, _ in self.rows]
        if len(set(names)) != len(names) or "last" in names:
            raise LayoutError(f"rows must have distinct names other than 'last', got {names}")
        for name, span in self.rows:
            if span.step != 1 or not 0 <= span.start <= span.stop <= at:
                raise LayoutError(f"rows '{name}' = {span} do not lie within the {at} tokens of the layout")
            if prunable.intersection(span):
                raise LayoutError(f"rows '{name}' = {span} contain tokens that may be pruned")

    @classmethod
    def build(cls, parts: Iterable[Segment], rows: Mapping[str, range] | None = None) -> TokenLayout:
        """Build a layout from segments in order; sets their `start` and leaves out empty ones."""
        placed: list[Segment] = []
        at = 0
        for part in parts:
            if part.length:
                placed.append(Segment(part.role, at, part.length, part.view, part.grid, part.prunable))
                at += part.length
        return cls(tuple(placed), tuple((rows or {}).items()))

    @cached_property
    def n_tokens(self) -> int:
        """Length of the unpruned sequence."""
        return sum(s.length for s in self.segments)

    @cached_property
    def prunable(self) -> tuple[int, ...]:
        """Original indices of the tokens that may be pruned, ascending."""
        return tuple(i for s in self.segments if s.prunable for i in s.span)

    @cached_property
    def fixed(self) -> tuple[int, ...]:
        """Original indices of the tokens that always stay, ascending."""
        return tuple(i for s in self.segments if not s.prunable for i in s.span)

    @cached_property
    def views(self) -> dict[str, Segment]:
        """Vision segments by camera name, in sequence order."""
        return {s.view: s for s in self.segments if s.view is not None}

    @property
    def readout(self) -> range:
        """Tokens whose final hidden states are read: the rows `readout`, or the last token where none are named."""
        return self.span("readout" if "readout" in self.row_names else "last")

    @cached_property
    def row_names(self) -> tuple[str, ...]:
        """Names that `span` accepts."""
        return (*(name for name, _ in self.rows), "last")

    def span(self, name: str) -> range:
        """Original indices of a named row; `last` is the last token of the sequence.

        Raises:
            LayoutError: If the layout has no such row.
        """
        if name == "last":
            return range(self.n_tokens - 1, self.n_tokens)
        for row, span in self.rows:
            if row == name:
                return span
        raise LayoutError(f"this layout has no rows '{name}'{nearest(name, self.row_names)}")
