"""Which steps of a demonstration are rendered, and the kinds of objects in the labels."""

from __future__ import annotations

EVERY = 4
"""Control steps between images; a policy is queried every eighth step, starting at any of them."""

LABELLED = 3
"""One image in this many has labels, since they take as long to render as images."""

KINDS = (
    "background", "robot", "gripper", "bowl", "plate", "ramekin", "cookies", "cream_cheese", "wine_bottle", "wine_rack",
    "stove", "cabinet",
)  # fmt: skip


def steps_of(length: int, number: int) -> list[int]:
    """Steps to render: the first, and every fourth with an offset that depends on the demonstration's number."""
    return sorted({0, *range(number % EVERY, length - 8, EVERY)})
