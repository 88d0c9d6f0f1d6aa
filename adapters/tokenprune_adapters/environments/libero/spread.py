"""Wider initial positions; LIBERO's own differ by only a few centimetres, which policies can almost memorise."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from tokenprune_adapters.environments.libero.conventions import SETTLE_ACTION, SETTLE_STEPS, Vector
from tokenprune_adapters.environments.libero.simulator import Simulator

CLEARANCE = 0.125
"""Smallest distance (m) between the centres of two objects, unless they are closer in the stock state."""

_ON_TABLE = 0.03
_HELD_STILL = 0.015
_TRIES = 100


def widen(simulator: Simulator, names: Collection[str], spread: float, seed: Sequence[int]) -> None:
    """Move objects over the table at random in a scene that has settled, and let it settle again.

    Each named object on the table moves by up to `spread` metres in x and in y. Positions are drawn again if two
    objects are closer than `CLEARANCE`, or if an object is pushed away while the scene settles. If no positions are
    found, the stock state stays.

    Args:
        simulator: The scene, at rest.
        names: Objects that may move.
        spread: Largest displacement along each axis, m.
        seed: Seed of the positions.
    """
    draw = np.random.default_rng(seed)
    objects = simulator.objects()
    lowest = min(position[2] for position in objects.values())
    moving = sorted(name for name in names if name in objects and objects[name][2] < lowest + _ON_TABLE)
    stock = simulator.save()
    for _ in range(_TRIES):
        moved = dict(objects)
        for name in moving:
            moved[name] = objects[name] + np.append(draw.uniform(-spread, spread, 2), 0.0)
        if not _apart(objects, moved, moving):
            continue
        for name in moving:
            simulator.place(name, moved[name])
        simulator.refresh()
        settle(simulator)
        found = simulator.objects()
        if all(np.linalg.norm(found[name][:2] - moved[name][:2]) < _HELD_STILL for name in objects):
            return
        simulator.restore(stock)


def settle(simulator: Simulator) -> None:
    """Step until objects are at rest."""
    for _ in range(SETTLE_STEPS):
        simulator.step(SETTLE_ACTION)


def _apart(stock: dict[str, Vector], moved: dict[str, Vector], moving: Sequence[str]) -> bool:
    """Whether no two objects are closer than the clearance, or than in the stock state if that is less."""
    for name in moving:
        for other in moved:
            if other == name:
                continue
            before, after = (np.linalg.norm((s[name] - s[other])[:2]) for s in (stock, moved))
            if after < min(CLEARANCE, float(before)):
                return False
    return True
