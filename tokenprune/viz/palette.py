"""Colours that stay distinct without red-green vision (Okabe and Ito, Color Universal Design, 2008)."""

from __future__ import annotations

from collections.abc import Iterable

from tokenprune.viz.result import OTHER, SCORE

Colour = tuple[int, int, int]

_KNOWN: dict[str, Colour] = {
    "dynamic": (213, 94, 0),
    "previous": (0, 114, 178),
    "local": (0, 158, 115),
    SCORE: (240, 228, 66),
    OTHER: (0, 0, 0),
}
_FURTHER: tuple[Colour, ...] = ((204, 121, 167), (86, 180, 233), (230, 159, 0))
MEANING = {
    "dynamic": "changed between frames",
    "previous": "attended last query",
    "local": "attended by early layers",
    SCORE: "ranked high by the score",
}
MODES: tuple[Colour, ...] = ((205, 222, 240), (250, 222, 180), (214, 236, 220), (235, 214, 228), (225, 225, 225))


def reason_colours(names: Iterable[str]) -> dict[str, Colour]:
    """Return the colour of each reason, 8 bits per channel; unknown reasons take the remaining colours in order."""
    further = iter(_FURTHER)
    return {name: _KNOWN.get(name) or next(further) for name in names}
