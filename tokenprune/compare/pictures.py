"""Pictures of a result: what its policy saw in the episode, and which tokens it kept there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenprune.compare.episode_source import episode_of
from tokenprune.loading import describe_backbone
from tokenprune.registry.discovery import Registry
from tokenprune.viz.film import write_pictures
from tokenprune.viz.result import Result


def draw_result(result: Result, registry: Registry, folder: Path, query: int | None = None) -> list[Path]:
    """Write one PNG per query and a GIF of all of them; no weights are read.

    Args:
        result: The run to draw.
        registry: Discovered plugins.
        folder: Where to write; made if it does not exist.
        query: Number of the only query to draw, from 0; then there is no GIF.

    Returns:
        The files, the GIF last.

    Raises:
        EpisodeError: If the episode of the result is gone, damaged, or another one.
        ConfigError: If the backbone cannot be described as it was.
        ResultError: If there is no such query, or the folder cannot be written to.
    """
    episode = episode_of(result, registry)
    crop = describe_backbone(result.backbone, registry, result.checkpoint, result.preset, result.options).pixels
    views = [view.name for view in result.views]

    def frames(step: int) -> Mapping[str, npt.NDArray[np.uint8]]:
        return {view: crop(episode.frame(step, view)).permute(1, 2, 0).numpy() for view in views}

    moved = np.empty(0)
    if result.translation:
        moved = np.linalg.norm(episode.actions[:, list(result.translation)], axis=1)
    return write_pictures(result, frames, moved, folder, query)
