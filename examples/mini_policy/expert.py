"""A scripted expert for LIBERO's pick-and-place tasks; it reads the true poses, which a policy cannot.

It is closed-loop: each action follows from the current poses, so it recovers from wherever noise or a policy has moved
the arm. Actions are in a policy's units: shares of the controller's largest step, gripper 1 open and 0 closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenprune_adapters.environments.libero.simulator import Simulator

Vector = npt.NDArray[np.float64]

METRES_PER_UNIT = 0.05
GAIN = 1.6
FASTEST = 0.8
"""Share of the controller's largest step."""
OPEN, CLOSED = 1.0, 0.0
REACHED = 0.012
"""Metres."""

_SLOW = 0.4
_NEARLY, _HELD, _PRESS = 0.03, 0.035, 0.02
_CLOSING_STEPS = 9


@dataclass(frozen=True)
class Job:
    """One pick-and-place job.

    Attributes:
        item: The object.
        target: The object or site to place it on.
        grasp: Position of the fingers relative to the object's origin, m `[3]`.
        release: Height of the object over the target's origin at which it is released, m: its height at rest.
        hover: Height of the hand over the grasp before it descends, m.
        carry: Height of the object while it is carried, over the target's origin and over its own start, m.
    """

    item: str
    target: str
    grasp: tuple[float, float, float]
    release: float = 0.006
    hover: float = 0.10
    carry: float = 0.12


_RIM, _DEPTH = 0.052, 0.02
_BOWL = "akita_black_bowl_1"


def _bowl(target: str, side: float = -1.0, **more: float) -> Job:
    return Job(_BOWL, target, (0.0, side * _RIM, _DEPTH), **more)


JOBS: Mapping[tuple[str, int], Job] = {
    ("libero_goal", 1): _bowl("flat_stove_1_cook_region", side=1.0, release=0.025),
    ("libero_goal", 4): _bowl("wooden_cabinet_1_top_side", side=1.0),
    ("libero_goal", 6): Job("cream_cheese_1", _BOWL, (0.0, 0.0, 0.0), release=0.042, carry=0.14),
    ("libero_goal", 8): _bowl("plate_1", side=1.0),
    **{("libero_spatial", task): _bowl("plate_1", side) for task, side in
       enumerate((-1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0))},
}  # fmt: skip


class Expert:
    """The expert of one episode.

    Attributes:
        phase: The current phase: approach, descend, close, lift, carry, lower or release.
    """

    def __init__(self, job: Job) -> None:
        """Begin with the approach."""
        self.job = job
        self.phase = "approach"
        self._closing = 0
        self._base = 0.0

    @property
    def delicate(self) -> bool:
        """Whether the hand is close to an object."""
        return self.phase in ("descend", "close", "lower", "release")

    def act(self, simulator: Simulator) -> Vector:
        """The action `[7]` for the simulator's current state."""
        hand, item = simulator.position, simulator.place_of(self.job.item)
        held = bool(np.linalg.norm(hand - item - self.job.grasp) < _HELD)
        target = simulator.place_of(self.job.target)
        dropped = self.phase in ("lift", "carry", "lower") and not held
        missed = self.phase == "release" and float(np.hypot(*(item - target)[:2])) > _NEARLY
        if dropped or missed:
            self.phase = "approach"
        if self.phase in ("approach", "descend", "close"):
            action = self._grasp(hand, item, held)
            if action is not None:
                return action
        return self._place(hand, item, target)

    def _grasp(self, hand: Vector, item: Vector, held: bool) -> Vector | None:
        """The action towards a grasp; None once the item is held."""
        grasp = item + self.job.grasp
        over = np.add(grasp, [0.0, 0.0, self.job.hover])
        aside, above = float(np.hypot(*(hand - grasp)[:2])), float((hand - grasp)[2])
        if self.phase == "approach":
            if aside >= REACHED or above >= self.job.hover + _NEARLY:
                return _towards(hand, over, OPEN)
            self.phase = "descend"
        if self.phase == "descend":
            if aside > 3 * REACHED:
                self.phase = "approach"
                return _towards(hand, over, OPEN)
            if above >= REACHED:
                return _towards(hand, grasp, OPEN)
            self.phase, self._closing = "close", 0
        self._closing += 1
        if self._closing <= _CLOSING_STEPS:
            return _towards(hand, hand, CLOSED)
        if not held:
            self.phase = "approach"
            return _towards(hand, over, OPEN)
        self.phase, self._base = "lift", float(item[2])
        return None

    def _place(self, hand: Vector, item: Vector, target: Vector) -> Vector:
        """The action that brings the held item to the target."""
        grip = hand - item
        height = max(target[2], self._base) + self.job.carry + grip[2]
        if self.phase == "lift":
            if hand[2] <= height - _NEARLY:
                # Slowly at first, because a rim slips out of the fingers when they jerk.
                slow = item[2] < self._base + _NEARLY
                return _towards(hand, np.array([*hand[:2], height]), CLOSED, _SLOW if slow else FASTEST)
            self.phase = "carry"
        goal = target + grip
        if self.phase == "carry":
            if float(np.hypot(*(goal - hand)[:2])) >= REACHED:
                return _towards(hand, np.array([*goal[:2], height]), CLOSED)
            self.phase = "lower"
        if item[2] > target[2] + self.job.release:
            return _towards(hand, np.add(goal, [0.0, 0.0, self.job.release - _PRESS]), CLOSED)
        self.phase = "release"
        return _towards(hand, hand, OPEN)


def _towards(hand: Vector, goal: Vector, gripper: float, fastest: float = FASTEST) -> Vector:
    delta = np.clip(GAIN * (goal - hand) / METRES_PER_UNIT, -fastest, fastest)
    return np.array([*delta, 0.0, 0.0, 0.0, gripper])
