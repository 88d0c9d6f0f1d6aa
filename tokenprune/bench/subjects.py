"""What a benchmark measures: backbones with a preset each, the episode they look at, and pipelines by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenprune.bench.speed import Subject
from tokenprune.compare.episode_source import open_episode
from tokenprune.errors import ConfigError
from tokenprune.loading import chosen_preset
from tokenprune.registry.discovery import Registry

DEFAULT_PIPELINES = (
    "uniform_grid@keep=0.5",
    "uniform_grid@keep=0.25",
    "uniform_grid@keep=0.125",
    "fastv@keep=0.25",
    "specprune.static",
    "specprune.dynamic",
    "specprune",
)
"""Measured where no pipeline is named: a ladder of kept tokens, and the strategies beside it."""


def choose_subjects(
    registry: Registry, backbones: Sequence[str], presets: Sequence[str] = (), episode: Path | None = None
) -> list[Subject]:
    """Choose a preset and an episode for each backbone.

    Args:
        registry: Discovered plugins.
        backbones: Registered names.
        presets: One for all, or one for each in their order; the first of each backbone when empty.
        episode: A recorded episode for all; the one that ships with each backbone when left out.

    Raises:
        PluginError: If a backbone is unknown.
        ConfigError: If the number of presets fits neither way, or a backbone has no preset or no episode.
        EpisodeError: If an episode is missing or damaged.
    """
    if len(presets) > 1 and len(presets) != len(backbones):
        raise ConfigError(
            f"--preset is given {len(presets)} times for {len(backbones)} backbones; "
            "give one for all, or one for each in their order"
        )
    each = presets if len(presets) == len(backbones) else [*presets, None][:1] * len(backbones)
    subjects = []
    for backbone, preset in zip(backbones, each, strict=True):
        chosen = chosen_preset(backbone, registry, None, preset)
        if chosen is None:
            raise ConfigError(f"backbone '{backbone}' has no preset to make weights from")
        subjects.append(Subject(backbone, chosen, open_episode(episode, registry, backbone)))
    return subjects
