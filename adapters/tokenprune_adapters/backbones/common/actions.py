"""The actions of LIBERO's robots."""

from __future__ import annotations

from tokenprune.model.info import ActionSpec

# robosuite's OSC_POSE controller scales its inputs to 5 cm and 0.5 rad.
LIBERO_ACTION = ActionSpec(
    horizon=1,
    groups={"translation": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)},
    gripper=(6, 0.5),
    metric={"translation": 0.05, "rotation": 0.5},
)
"""Actions with a gripper command from 0 to 1, one per chunk."""
