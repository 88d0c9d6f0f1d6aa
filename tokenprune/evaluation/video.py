"""Writes a video of one episode: the policy's images, with the patches grey that its last query cut."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tokenprune.engine.adapter import Backbone
from tokenprune.engine.trace import QueryTrace
from tokenprune.errors import ConfigError
from tokenprune.evaluation.environment import Frames
from tokenprune.evaluation.starts import Start
from tokenprune.policy import ActionChunk
from tokenprune.viz.paint import greyed, patch_box, veil

_SIDE = 336
_CAPTION = 24


def imageio() -> ModuleType:
    """Return the library that writes videos.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import imageio.v2

        # imageio loads it itself, but only when it writes.
        importlib.import_module("imageio_ffmpeg")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'videos are written with imageio and imageio-ffmpeg ({error}): pip install "tokenprune-vla[viz]"'
        ) from error
    return imageio.v2


class Video:
    """An `.mp4` that grows with each control step; pass it to `run_episode` as `on_step`.

    Args:
        path: The file; an existing one is replaced.
        backbone: Crops the images that its patches are cut from.
        label: Written under the images.
        hz: Control steps per second.
    """

    def __init__(self, path: Path, backbone: Backbone, label: str, hz: float) -> None:
        """Open the file.

        Raises:
            ConfigError: If imageio is missing.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = imageio().get_writer(path, fps=hz, codec="libx264", macro_block_size=8, quality=7)
        self._backbone, self._label, self._step = backbone, label, 0

    def __call__(self, frames: Frames, chunk: ActionChunk) -> None:
        """Append one frame."""
        pixels = self._backbone.pixels([frames()])
        pictures = [
            _painted(image[0].permute(1, 2, 0).cpu().numpy(), view, chunk.trace) for view, image in pixels.items()
        ]
        self._writer.append_data(np.vstack([np.hstack(pictures), self._caption(chunk.trace, _SIDE * len(pictures))]))
        self._step += 1

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def _caption(self, trace: QueryTrace, width: int) -> npt.NDArray[np.uint8]:
        bar = Image.new("RGB", (width, _CAPTION), (255, 255, 255))
        held = f"{trace.plan.prunable[-1]} of {len(trace.plan.layout.prunable)} visual tokens at the last layer"
        text = f"{self._label}   step {self._step}   {trace.mode}   {held}"
        ImageDraw.Draw(bar).text((6, 6), text, fill=(30, 30, 30))
        return np.array(bar)


def video_path(folder: Path, start: Start, label: str) -> Path:
    """Return the path of the video of a variant's episode."""
    name = f"{start.environment}-task{start.task}-init{start.init_state}-seed{start.seed}"
    return folder / f"{name}-{re.sub(r'[^A-Za-z0-9.+=-]+', '_', label)}.mp4"


def _painted(pixels: npt.NDArray[np.uint8], view: str, trace: QueryTrace) -> npt.NDArray[np.uint8]:
    picture = np.array(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    segment = trace.plan.layout.views[view]
    if segment.grid is None:
        return picture
    left = set(segment.span)
    for index, ids in enumerate(trace.kept.values()):
        gone = greyed(picture, veil(index, len(trace.kept)))
        kept = set(ids[0].tolist())
        for token in left - kept:
            where = patch_box(segment.grid, token - segment.start, picture.shape[:2])
            picture[where] = gone[where]
        left &= kept
    return picture
