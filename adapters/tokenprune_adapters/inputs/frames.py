"""The check of camera frames."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokenprune.errors import ObservationError

MIN_SIDE, MAX_SIDE = 64, 4096


def check_image(view: str, image: object) -> npt.NDArray[np.uint8]:
    """Refuse anything that is not a camera frame.

    Args:
        view: Name of the camera, for the message.
        image: The value in the observation.

    Returns:
        The same array, `[H, W, 3]` uint8.

    Raises:
        ObservationError: Saying what was found, what is valid and how to get there.
    """
    valid = f"valid: a numpy array [H, W, 3], uint8, RGB, sides from {MIN_SIDE} to {MAX_SIDE}"
    if not isinstance(image, np.ndarray):
        kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
        raise ObservationError(f"image '{view}' is a {kind}; {valid}")
    found = f"image '{view}' is {image.dtype} with shape {list(image.shape)}"
    if image.ndim != 3:
        hint = "give one frame, not a batch" if image.ndim == 4 else "give height, width and three channels"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if image.shape[2] != 3:
        hint = "channels come first, transpose to [H, W, 3]" if image.shape[0] == 3 else "three channels are needed"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if image.dtype != np.uint8:
        floating = np.issubdtype(image.dtype, np.floating)
        hint = "convert [0, 1] with (255 * image).round().astype(np.uint8)" if floating else "convert to 0..255 uint8"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in image.shape[:2]):
        raise ObservationError(f"{found}; {valid}")
    return image
