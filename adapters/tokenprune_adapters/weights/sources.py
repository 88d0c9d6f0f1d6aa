"""Where a policy's weights come from: a checkpoint, or a preset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError


def one_source(preset: str | None, checkpoint: Path | None) -> None:
    """Refuse two sources.

    Raises:
        ConfigError: If both are given.
    """
    if preset is not None and checkpoint is not None:
        raise ConfigError("give a preset or a checkpoint, not both")


def existing(checkpoint: Path | None) -> Path | None:
    """The checkpoint, if it is a folder here and no hub id."""
    return None if checkpoint is None or not Path(checkpoint).is_dir() else Path(checkpoint)


def preset_of(backbone: str, name: str | None, presets: Iterable[str], options: Mapping[str, Any]) -> str:
    """The preset's name, with options that a preset can have.

    Raises:
        ConfigError: If no preset is named, or an option needs a checkpoint.
    """
    if name is None:
        raise ConfigError(f"backbone '{backbone}' needs a checkpoint, or a preset ({', '.join(presets)})")
    if "unnorm_key" in options:
        raise ConfigError("unnorm_key names statistics of a checkpoint; an untrained preset has none")
    return name
