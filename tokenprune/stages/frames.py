"""Camera frames of past control steps, kept on the host until a stage compares one with the current frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Images = Mapping[str, np.ndarray]


class FrameBuffer:
    """The newest frames of one episode by control step, as the host gave them or is ready to draw them.

    Args:
        capacity: Control steps to look back at most; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        """Nothing has been seen yet."""
        self._capacity = capacity
        self._frames: dict[int, Images | Callable[[], Images]] = {}

    def add(self, step: int, images: Images | Callable[[], Images]) -> None:
        """Keep the images `{view: uint8 [H, W, 3]}` of a control step, or what draws them; steps ascend."""
        if not self._capacity:
            return
        self._frames[step] = images if callable(images) else _copied(images)
        # Where frames are sparse, the newest of those that are old enough is still needed.
        reached = [s for s in self._frames if s <= step - self._capacity]
        for old in reached[:-1]:
            del self._frames[old]

    def find(self, now: int, back: int) -> int | None:
        """Control step of the newest frame at least `back` steps before `now`, else of the oldest one before `now`.

        Returns:
            None if no frame is older than `now`.
        """
        past = [step for step in self._frames if step < now]
        return max((step for step in past if step <= now - back), default=min(past, default=None))

    def images(self, step: int, check: Callable[[Images], None] = lambda images: None) -> Images:
        """The images of a step `find` named, drawn now if they have not been.

        Args:
            step: Control step.
            check: Called with what is drawn; raises where it cannot be used.
        """
        held = self._frames[step]
        if callable(held):
            drawn = held()
            check(drawn)
            self._frames[step] = held = _copied(drawn)
        return held


def _copied(images: Images) -> Images:
    # Simulators render into the same array again and again.
    return {view: np.array(image) for view, image in images.items()}
