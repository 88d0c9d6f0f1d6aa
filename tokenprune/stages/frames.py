"""Camera frames of past control steps, kept on the host for stages that compare them with current ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Images = Mapping[str, np.ndarray]


class FrameBuffer:
    """The newest frames of one episode by control step, as images or as functions that render them.

    Args:
        capacity: Most control steps to look back; 0 keeps nothing.
    """

    def __init__(self, capacity: int) -> None:
        """Start without frames."""
        self._capacity = capacity
        self._frames: dict[int, Images | Callable[[], Images]] = {}

    def add(self, step: int, images: Images | Callable[[], Images]) -> None:
        """Keep the images `{view: uint8 [H, W, 3]}` of a control step, or a function that renders them.

        Steps must ascend.
        """
        if not self._capacity:
            return
        self._frames[step] = images if callable(images) else _copied(images)
        # Of the frames older than the capacity, `find` may still return the newest.
        expired = [s for s in self._frames if s <= step - self._capacity]
        for old in expired[:-1]:
            del self._frames[old]

    def find(self, now: int, back: int) -> int | None:
        """Control step of the newest frame at least `back` steps before `now`, else of the oldest before `now`.

        None if no frame is older than `now`.
        """
        past = [step for step in self._frames if step < now]
        return max((step for step in past if step <= now - back), default=min(past, default=None))

    def images(self, step: int, check: Callable[[Images], None] = lambda images: None) -> Images:
        """The images of a step that `find` returned, rendered now if they have not been yet.

        Args:
            step: Control step.
            check: Called with newly rendered images; raises if they cannot be used.
        """
        images = self._frames[step]
        if callable(images):
            rendered = images()
            check(rendered)
            self._frames[step] = images = _copied(rendered)
        return images


def _copied(images: Images) -> Images:
    # Simulators render into the same array at every step.
    return {view: np.array(image) for view, image in images.items()}
