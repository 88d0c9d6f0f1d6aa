"""Observations, checked before anything runs, so that bad input never becomes an action."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tokenprune.errors import ObservationError, nearest

MIN_SIDE, MAX_SIDE = 64, 4096
_KEYS = ("images", "state")


def check_image(view: str, image: object) -> npt.NDArray[np.uint8]:
    """Refuse anything that is not a camera frame.

    Args:
        view: Name of the camera, for the message.
        image: What the observation holds.

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


def check_observation(observation: object, views: Sequence[str], state_size: int | None) -> None:
    """Refuse an observation with wrong views, images or state.

    Args:
        observation: What the caller gave: `{"images": {view: uint8 [H, W, 3]}, "state": [S]}`.
        views: Cameras the policy looks at.
        state_size: Numbers of robot state it reads; None where it reads none, and then a state may be given or not.

    Raises:
        ObservationError: Saying what was found and what is valid.
    """
    if not isinstance(observation, Mapping) or not isinstance(observation.get("images"), Mapping):
        raise ObservationError("an observation is {'images': {view: uint8 [H, W, 3]}, 'state': [S]}")
    for key in observation:
        if key not in _KEYS:
            raise ObservationError(f"an observation has no '{key}'{nearest(str(key), _KEYS)}")
    images = observation["images"]
    for view in views:
        if view not in images:
            looks, got = ", ".join(views), ", ".join(map(str, images)) or "none"
            raise ObservationError(f"view '{view}' is missing; this policy looks at {looks}, got {got}")
        check_image(view, images[view])
    for view in images:
        if view not in views:
            raise ObservationError(f"this policy has no view '{view}'{nearest(str(view), views)}")
    if state_size is not None:
        _check_state(observation.get("state"), state_size)


def _check_state(state: object, size: int) -> None:
    if state is None:
        raise ObservationError(f"the state is missing; this policy reads {size} numbers of robot state")
    try:
        values = np.asarray(state, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"the state must be {size} numbers, got {type(state).__name__}") from error
    if values.shape != (size,):
        raise ObservationError(f"the state must be {size} numbers, got shape {list(values.shape)}")
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        raise ObservationError(f"the state holds NaN or infinite numbers at {bad}")
