"""Dataset statistics, which map actions and robot state between the environment's units and the policy's."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tokenprune.errors import CheckpointError, nearest


class Normaliser(Protocol):
    """A map between the environment's units and the policy's, separate for each dimension."""

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the environment's units to the policy's."""
        ...

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the policy's units to the environment's."""
        ...


@dataclass(frozen=True)
class Bounds:
    """Maps bounds to -1 and 1 (upstream OpenVLA, upstream OpenVLA-OFT).

    Attributes:
        low: `[D]`.
        high: `[D]`.
        mask: False for dimensions that are passed through, `[D]`.
        epsilon: Added to the range. OpenVLA-OFT adds 1e-8, OpenVLA nothing.
    """

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray
    epsilon: float = 1e-8

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the environment's units to [-1, 1], clipped."""
        scaled = np.clip(2 * (values - self.low) / (self.high - self.low + self.epsilon) - 1, -1, 1)
        return np.where(self.mask, scaled, values)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in [-1, 1] to the environment's units."""
        return np.where(self.mask, 0.5 * (values + 1) * (self.high - self.low + self.epsilon) + self.low, values)


@dataclass(frozen=True)
class Standard:
    """Maps mean and standard deviation to 0 and 1 (upstream openpi for pi0).

    Attributes:
        mean: `[D]`.
        std: `[D]`.
        epsilon: Added to the standard deviation.
    """

    mean: np.ndarray
    std: np.ndarray
    epsilon: float = 1e-6

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the environment's units to z-scores."""
        scores: np.ndarray = (values - self.mean) / (self.std + self.epsilon)
        return scores

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Map z-scores `[..., D]` to the environment's units."""
        restored: np.ndarray = values * (self.std + self.epsilon) + self.mean
        return restored


@dataclass(frozen=True)
class Quantiles:
    """Maps two quantiles to -1 and 1, without clipping (upstream openpi for pi0.5).

    Attributes:
        low: `[D]`.
        high: `[D]`.
        epsilon: Added to the range.
    """

    low: np.ndarray
    high: np.ndarray
    epsilon: float = 1e-6

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the environment's units so that most lie in [-1, 1]."""
        scaled: np.ndarray = (values - self.low) / (self.high - self.low + self.epsilon) * 2 - 1
        return scaled

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]`, most of it in [-1, 1], to the environment's units."""
        restored: np.ndarray = (values + 1) / 2 * (self.high - self.low + self.epsilon) + self.low
        return restored


@dataclass(frozen=True)
class Statistics:
    """How the actions and the robot state of a dataset are normalised.

    Attributes:
        key: The dataset.
        action: For actions.
        state: For the robot state, None if the policy reads none.
    """

    key: str
    action: Normaliser
    state: Normaliser | None

    @classmethod
    def identity(cls, dims: int, state_size: int | None) -> Statistics:
        """Statistics of no dataset: everything is already in [-1, 1]."""

        def unit(size: int) -> Bounds:
            return Bounds(-np.ones(size), np.ones(size), np.ones(size, dtype=bool))

        return cls("(none)", unit(dims), None if state_size is None else unit(state_size))

    @classmethod
    def read(
        cls,
        data: Mapping[str, Any],
        key: str | None,
        dims: int,
        state_size: int | None,
        where: str,
        fields: tuple[str, str] = ("q01", "q99"),
        epsilon: float = 1e-8,
    ) -> Statistics:
        """Read one dataset's bounds from an OpenVLA or OpenVLA-OFT release.

        Args:
            data: `dataset_statistics.json`, or `norm_stats` of `config.json`: dataset key to
                `{"action": {"q01", "q99", "min", "max", "mask"}, "proprio": {...}}`.
            key: Dataset; may be None if the file has only one.
            dims: Numbers per action.
            state_size: Numbers of robot state, None if the policy reads none.
            where: The file, for errors.
            fields: The two fields that are mapped to -1 and 1: quantiles, or `("min", "max")` for OpenVLA-OFT's
                ALOHA releases.
            epsilon: See `Bounds`.

        Raises:
            CheckpointError: If the key is unknown or not given, or its statistics are incomplete.
        """
        if not isinstance(data, Mapping) or not data:
            raise CheckpointError(f"{where}: holds no dataset statistics")
        if key is None:
            if len(data) != 1:
                raise CheckpointError(
                    f"{where}: holds statistics of several datasets; give unnorm_key, one of {', '.join(sorted(data))}"
                )
            key = next(iter(data))
        if key not in data:
            raise CheckpointError(f"{where}: no statistics for '{key}'{nearest(key, data)}")

        def bounds(part: str, size: int) -> Bounds:
            at = f"{where}: {key}"
            low, high = (numbers(json_object(data[key], part, at), name, size, f"{at}: {part}") for name in fields)
            check_ascending(low, high, fields, f"{at}: {part}")
            return Bounds(low, high, _mask(data[key][part], size, f"{at}: {part}"), epsilon)

        return cls(key, bounds("action", dims), None if state_size is None else bounds("proprio", state_size))


def json_object(entry: object, part: str, where: str) -> Mapping[str, Any]:
    """The JSON object under the name `part` in `entry`.

    Raises:
        CheckpointError: If there is none.
    """
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where}: holds a {type(entry).__name__}; valid: an object with '{part}'")
    if part not in entry:
        raise CheckpointError(f"{where}: '{part}' is missing{nearest(part, map(str, entry))}")
    if not isinstance(entry[part], Mapping):
        raise CheckpointError(f"{where}: '{part}' is a {type(entry[part]).__name__}; valid: an object")
    found: Mapping[str, Any] = entry[part]
    return found


def numbers(entry: Mapping[str, Any], name: str, size: int, where: str, longer: bool = False) -> np.ndarray:
    """One statistic, float64 `[size]`.

    Args:
        entry: The statistics of actions or of the state.
        name: Name of the statistic.
        size: How many numbers it must have.
        where: The file and the path of `entry` in it, for errors.
        longer: Allow more numbers and keep the first `size`, for files whose statistics are padded.

    Raises:
        CheckpointError: If it is missing, or is not `size` finite numbers.
    """
    if entry.get(name) is None:
        raise CheckpointError(f"{where}.{name} is missing{nearest(name, map(str, entry))}")
    try:
        values = np.asarray(entry[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}.{name} is malformed; valid: {size} finite numbers ({error})") from error
    fits = values.ndim == 1 and (len(values) >= size if longer else len(values) == size)
    if not fits or not np.isfinite(values).all():
        least = "at least " if longer else ""
        raise CheckpointError(f"{where}.{name} must be {least}{size} finite numbers, got shape {values.shape}")
    return values[:size]


def check_ascending(low: np.ndarray, high: np.ndarray, fields: tuple[str, str], where: str) -> None:
    """Refuse bounds that would invert a dimension.

    Raises:
        CheckpointError: If a low bound is above its high bound.
    """
    if (low > high).any():
        at = np.flatnonzero(low > high).tolist()
        raise CheckpointError(f"{where}: {fields[0]} is above {fields[1]} at {at}; valid: the other way round")


def _mask(entry: Mapping[str, Any], size: int, where: str) -> np.ndarray:
    # Some released files have no mask; then every dimension is scaled.
    mask = entry.get("mask", [True] * size)
    if not isinstance(mask, list) or len(mask) != size or not all(isinstance(value, bool) for value in mask):
        raise CheckpointError(f"{where}.mask is {reprlib.repr(mask)}; valid: {size} booleans")
    return np.array(mask)
