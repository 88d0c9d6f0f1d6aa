"""Where a policy's weights come from: a checkpoint, or a preset, which has none."""

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


def preset_of(backbone: str, name: str | None, presets: Iterable[str], options: Mapping[str, Any]) -> str:
    """The preset's name, with options that a preset can have.

    Raises:
        ConfigError: If no preset is named, or an option needs a checkpoint.
    """
    if name is None:
        raise ConfigError(f"backbone '{backbone}' needs a checkpoint, or a preset ({', '.join(presets)}), untrained")
    if "unnorm_key" in options:
        raise ConfigError("unnorm_key names statistics of a checkpoint; a preset has none")
    return name
