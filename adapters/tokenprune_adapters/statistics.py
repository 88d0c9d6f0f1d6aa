"""Dataset statistics that map actions and robot state between the environment's units and [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenprune.errors import CheckpointError, nearest

# Upstream OpenVLA-OFT adds this to the range it divides and multiplies by.
_EPSILON = 1e-8


@dataclass(frozen=True)
class Bounds:
    """Low and high values per dimension `[D]`; where `mask` is False a dimension is passed through."""

    low: np.ndarray
    high: np.ndarray
    mask: np.ndarray

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in the environment's units to [-1, 1], clipped."""
        scaled = np.clip(2 * (values - self.low) / (self.high - self.low + _EPSILON) - 1, -1, 1)
        return np.where(self.mask, scaled, values)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """Map `[..., D]` in [-1, 1] to the environment's units."""
        return np.where(self.mask, 0.5 * (values + 1) * (self.high - self.low + _EPSILON) + self.low, values)


@dataclass(frozen=True)
class Statistics:
    """Bounds of a dataset's actions and, where the policy reads it, its robot state."""

    key: str
    action: Bounds
    state: Bounds | None

    @classmethod
    def identity(cls, dims: int, state_size: int | None) -> Statistics:
        """Statistics of no dataset: everything is already in [-1, 1]."""

        def unit(size: int) -> Bounds:
            return Bounds(-np.ones(size), np.ones(size), np.ones(size, dtype=bool))

        return cls("(none)", unit(dims), None if state_size is None else unit(state_size))

    @classmethod
    def read(
        cls, data: Mapping[str, Any], key: str | None, dims: int, state_size: int | None, where: str
    ) -> Statistics:
        """Read one dataset's quantiles from a release's `dataset_statistics.json`.

        Args:
            data: The file's content: dataset key to `{"action": {"q01", "q99", "mask"}, "proprio": {...}}`.
            key: Dataset; may be left out where the file has one only.
            dims: Numbers per action.
            state_size: Numbers of robot state, None where the policy reads none.
            where: The file, for errors.

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
        entry = data[key]
        action = _bounds(entry, "action", dims, f"{where}: {key}")
        state = None if state_size is None else _bounds(entry, "proprio", state_size, f"{where}: {key}")
        return cls(key, action, state)


def _bounds(entry: object, part: str, size: int, where: str) -> Bounds:
    block = entry.get(part) if isinstance(entry, Mapping) else None
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{where}: '{part}' is missing")
    arrays = []
    for name in ("q01", "q99"):
        if name not in block:
            raise CheckpointError(f"{where}: '{part}.{name}' is missing")
        values = np.asarray(block[name], dtype=np.float64)
        if values.shape != (size,) or not np.isfinite(values).all():
            raise CheckpointError(f"{where}: '{part}.{name}' must be {size} finite numbers, got shape {values.shape}")
        arrays.append(values)
    # A released file may leave the mask out; then every dimension is scaled.
    mask = np.asarray(block.get("mask", [True] * size), dtype=bool)
    if mask.shape != (size,):
        raise CheckpointError(f"{where}: '{part}.mask' must be {size} booleans, got shape {mask.shape}")
    return Bounds(arrays[0], arrays[1], mask)
