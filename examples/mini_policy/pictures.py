"""Which moments of a demonstration are drawn, and what can be seen in them."""

from __future__ import annotations

EVERY = 4
"""Control steps between pictures; a policy is asked every eighth, from any of them."""

LABELLED = 3
"""Every so many-th picture has labels: enough for the tower, and they cost as much as pictures."""

KINDS = (
    "background", "robot", "gripper", "bowl", "plate", "ramekin", "cookies", "cream_cheese", "wine_bottle", "wine_rack",
    "stove", "cabinet",
)  # fmt: skip


def steps_of(length: int, number: int) -> list[int]:
    """Steps that are drawn: the first, and every fourth from another start in each demonstration."""
    return sorted({0, *range(number % EVERY, length - 8, EVERY)})
