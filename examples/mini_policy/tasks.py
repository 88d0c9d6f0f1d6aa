"""What the mini policy is trained for, and how LIBERO is set up for it."""

from __future__ import annotations

TASKS = {"libero_goal": (1, 4, 6, 8), "libero_spatial": (0, 1, 2, 3, 7, 8)}
"""Per suite. The four of LIBERO-Goal share one scene, so only the instruction tells them apart."""

TRAIN_STATES = range(25)
TEST_STATES = range(25, 50)
"""Initial states; none is in both."""

SPREAD = 0.05
"""Initial positions are widened by up to so many metres."""

ENVIRONMENT_OPTIONS = {"size": 224, "quality": "fast"}
