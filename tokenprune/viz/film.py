"""Writes pictures of queries, and an animation of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tokenprune.errors import ResultError
from tokenprune.viz.draw import draw_query
from tokenprune.viz.result import Result

Frames = Callable[[int], Mapping[str, npt.NDArray[np.uint8]]]

_MILLISECONDS = 700


def write_pictures(
    result: Result, frames: Frames, speed: npt.NDArray[np.floating], folder: Path, query: int | None = None
) -> list[Path]:
    """Write one PNG per query and a GIF of all of them; existing files are replaced.

    Args:
        result: The run to draw.
        frames: Returns the policy's images at a control step, RGB `[H, W, 3]` by view.
        speed: Length of each control step's translation, `[T]`; empty where it is not known.
        folder: Where to write; made if it does not exist.
        query: Number of the only query to draw, from 0; then there is no GIF.

    Returns:
        The files, the GIF last.

    Raises:
        ResultError: If there is no such query, or the folder cannot be written to.
    """
    last = len(result.queries) - 1
    if query is not None and not 0 <= query <= last:
        raise ResultError(f"'{result.label}' has no query {query}; valid: 0 to {last}")
    name = re.sub(r"[^\w.@=,+-]+", "_", result.label)
    written, film = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(last + 1) if query is None else (query,):
            picture = Image.fromarray(draw_query(result, index, frames(result.queries[index].step), speed))
            written.append(folder / f"{name}-query-{index:03d}.png")
            picture.save(written[-1])
            film.append(picture.quantize(256))
        if query is None:
            written.append(folder / f"{name}.gif")
            film[0].save(written[-1], save_all=True, append_images=film[1:], duration=_MILLISECONDS, loop=0)
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror or error}") from error
    return written
