"""Opens recorded episodes: of a file, the one that ships with a backbone, or the one a result was made from."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from tokenprune.compare.episode import Episode, load_episode
from tokenprune.errors import ConfigError, EpisodeError
from tokenprune.registry.discovery import Registry
from tokenprune.viz.result import Result


def bundled_episode(registry: Registry, backbone: str) -> Path:
    """Return the path of the episode that ships with a backbone.

    Raises:
        PluginError: If the backbone is unknown.
        ConfigError: If no episode ships with it.
    """
    name = registry.backbone(backbone).spec.episode
    if not name:
        raise ConfigError(f"no episode ships with backbone '{backbone}'; give one with --episode PATH")
    package, _, resource = name.partition(":")
    return Path(str(importlib.resources.files(package).joinpath(resource)))


def open_episode(path: Path | None, registry: Registry, backbone: str) -> Episode:
    """Load an episode, or the one that ships with the backbone where `path` is None.

    Raises:
        ConfigError: If no path is given and no episode ships with the backbone.
        EpisodeError: If the file is missing or damaged.
    """
    return load_episode(path or bundled_episode(registry, backbone))


def episode_of(result: Result, registry: Registry) -> Episode:
    """Load the episode that a result was made from.

    Raises:
        ConfigError: If it shipped with the backbone, and none ships with it now.
        EpisodeError: If the file is gone, damaged, or holds another episode.
    """
    path = result.episode_path
    if path is not None and not path.exists():
        raise EpisodeError(f"the episode this result was made from is gone: {path} (from the current folder)")
    episode = open_episode(path, registry, result.backbone)
    dims = episode.actions.shape[1]
    if episode.instruction != result.instruction or max(result.translation, default=0) >= dims:
        raise EpisodeError(
            f"episode '{episode.name}' is not the one this result was made from: it holds actions of {dims} numbers "
            f'for "{episode.instruction}", the result "{result.instruction}"'
        )
    return episode
