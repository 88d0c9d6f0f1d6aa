"""Backbone options: which exist, which values they take, and how each changes a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from tokenprune.errors import ConfigError, nearest

ConfigT = TypeVar("ConfigT")
ChoiceT = TypeVar("ChoiceT")


def preset_config(backbone: str, name: str, presets: Mapping[str, ConfigT], trained: Iterable[str] = ()) -> ConfigT:
    """The configuration of an untrained preset.

    Args:
        backbone: Registered name of the backbone, for errors.
        name: Name of the preset.
        presets: The untrained presets.
        trained: Further presets that errors name as valid.

    Raises:
        ConfigError: If there is no such preset.
    """
    if name not in presets:
        raise ConfigError(f"backbone '{backbone}' has no preset '{name}'{nearest(name, (*trained, *presets))}")
    return presets[name]


def apply_options(
    backbone: str,
    config: ConfigT,
    options: Mapping[str, Any],
    setters: Mapping[str, Callable[[ConfigT, object], ConfigT]],
) -> ConfigT:
    """Apply options one after the other.

    Args:
        backbone: Registered name of the backbone, for errors.
        config: The configuration to begin with.
        options: Name to value.
        setters: What each option does: takes a configuration and the value, returns the changed configuration.

    Raises:
        ConfigError: If an option is unknown or its value is not valid.
    """
    for key, value in options.items():
        if key not in setters:
            raise ConfigError(f"backbone '{backbone}' has no option '{key}'{nearest(key, setters)}")
        config = setters[key](config, value)
    return config


def check_unnorm_key(config: ConfigT, value: object) -> ConfigT:
    """Setter of `unnorm_key`, the dataset whose statistics are used; the configuration does not depend on it.

    Raises:
        ConfigError: If it is not a string.
    """
    if not isinstance(value, str):
        raise ConfigError(f"unnorm_key must be the name of a dataset, got {value!r}")
    return config


def flag(key: str, value: object) -> bool:
    """An option that is true or false.

    Raises:
        ConfigError: If it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {value!r}")
    return value


def whole_number(key: str, value: object, least: int = 1, most: int | None = None) -> int:
    """An option that is a whole number from `least` to `most`.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        valid = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(f"{key} must be a whole number, {valid}, got {value!r}")
    return value


def choice(key: str, value: object, valid: tuple[ChoiceT, ...]) -> ChoiceT:
    """An option that is one of a few values.

    Raises:
        ConfigError: If it is not.
    """
    for option in valid:
        if value == option:
            return option
    raise ConfigError(f"there is no {key} {value!r}{nearest(str(value), map(str, valid))}")


def view_names(value: object, order: str) -> tuple[str, ...]:
    """The option `views` of a policy with one to three cameras.

    Args:
        value: A list of camera names.
        order: What their order means, for errors.

    Raises:
        ConfigError: If it is not a list of one to three distinct names.
    """
    names = tuple(value) if isinstance(value, list | tuple) else ()
    named = all(isinstance(name, str) and name for name in names)
    if not 1 <= len(names) <= 3 or not named or len(set(names)) != len(names):
        raise ConfigError(f"views must be one to three distinct camera names in {order} order, got {value!r}")
    return names
