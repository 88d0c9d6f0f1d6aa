"""Paints patches over a camera picture: grey where cut, an outline by reason where kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.viz.palette import Colour
from tokenprune.viz.result import QueryResult, View

_FIRST_CUT, _LAST_CUT = 0.74, 0.4
_WHITE = 0.8
_EDGE = (45, 45, 45)


def veil(index: int, cuts: int) -> float:
    """Return how strongly the patches of a cut are faded to light grey, from 0 to 1; earlier cuts are fainter."""
    return _FIRST_CUT + (_LAST_CUT - _FIRST_CUT) * index / max(1, cuts - 1)


def greyed(pixels: npt.NDArray[np.uint8], strength: float) -> npt.NDArray[np.uint8]:
    """Return the luminance, faded to light grey, as RGB `[H, W, 3]`.

    Args:
        pixels: RGB, `[H, W, 3]`.
        strength: 0 keeps the luminance, 1 removes it.
    """
    luminance = pixels @ np.array([0.299, 0.587, 0.114])
    faint = (1 - strength) * luminance + strength * 255 * _WHITE
    return np.repeat(faint.round().astype(np.uint8)[..., None], 3, axis=-1)


def paint(
    pixels: npt.NDArray[np.uint8], side: int, view: View, query: QueryResult, colours: Mapping[str, Colour]
) -> npt.NDArray[np.uint8]:
    """Return one camera picture with cut patches grey and the reasons of kept ones outlined.

    Args:
        pixels: The policy's image, RGB `[H, W, 3]`.
        side: Pixels of the picture's longer side.
        view: The camera's tokens.
        query: Which tokens were cut or kept.
        colours: Colour of every reason.

    Returns:
        RGB `[side, side, 3]` for a square frame.
    """
    scale = side / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    picture = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    if view.grid is None:
        return picture
    veiled = [greyed(picture, veil(index, len(query.cuts))) for index in range(len(query.cuts))]
    for patch, token in enumerate(view.span):
        where = patch_box(view.grid, patch, picture.shape[:2])
        if token in query.lost:
            picture[where] = veiled[query.lost[token]][where]
        elif token in query.reasons:
            _outline(picture[where], colours[query.reasons[token]])
    return picture


def patch_box(grid: tuple[int, int], patch: int, size: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rows and columns of pixels of a patch in a picture of `size` `(H, W)`."""
    edges = [np.linspace(0, pixels, n + 1).round().astype(int) for pixels, n in zip(size, grid, strict=True)]
    row, column = divmod(patch, grid[1])
    return slice(edges[0][row], edges[0][row + 1]), slice(edges[1][column], edges[1][column + 1])


def _outline(block: npt.NDArray[np.uint8], colour: Colour) -> None:
    """Draw a frame inside a patch `[h, w, 3]`, with a dark line for contrast where there is room."""
    height, width = block.shape[:2]
    roomy = min(height, width) >= 15
    inside = block[3:-3, 3:-3] if roomy else block[1:-1, 1:-1]
    pixels = inside.copy()
    block[:] = _EDGE if roomy else colour
    block[1:-1, 1:-1] = colour
    inside[:] = pixels
