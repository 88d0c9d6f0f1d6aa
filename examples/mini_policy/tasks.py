"""Tasks, initial states and LIBERO options of the mini policy."""

from __future__ import annotations

TASKS = {"libero_goal": (1, 4, 6, 8), "libero_spatial": (0, 1, 2, 3, 7, 8)}
"""Tasks by suite. The four of LIBERO-Goal share one scene and differ only in the instruction."""

TRAIN_STATES = range(25)
TEST_STATES = range(25, 50)
"""Initial states for training and for evaluation."""

SPREAD = 0.05
"""Objects are moved by up to this many metres along each axis."""

ENVIRONMENT_OPTIONS = {"size": 224, "quality": "fast"}
