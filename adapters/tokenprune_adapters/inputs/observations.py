"""The check of observations, and the upload of their frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import ObservationError, nearest
from tokenprune.model.device import upload
from tokenprune_adapters.inputs.frames import check_image


class FrameTransform(Protocol):
    """How a policy prepares a camera frame."""

    def cropped(self, image: np.ndarray) -> Tensor:
        """A camera frame `[H, W, 3]` as the policy crops it, uint8 `[3, S, S]`."""
        ...

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        """What `cropped` returns, bit for bit, for a batch `[B, H, W, 3]` on a device; uint8 `[B, 3, S, S]`."""
        ...


_KEYS = ("images", "state")


def check_observation(observation: object, views: Sequence[str], state_size: int | None) -> None:
    """Refuse an observation with wrong views, images or state.

    Args:
        observation: `{"images": {view: uint8 [H, W, 3]}, "state": [S]}`.
        views: The policy's cameras.
        state_size: Numbers of robot state that the policy reads; None if it reads none, and then a state is optional.

    Raises:
        ObservationError: Naming the view or field, what was found and what is valid.
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


def crops_on_device(device: torch.device) -> bool:
    """Whether frames are uploaded first and cropped on the device; on a CPU, Pillow is faster."""
    return device.type == "cuda"


def upload_frames(
    frames: Sequence[Mapping[str, np.ndarray]], views: Sequence[str], transform: FrameTransform, device: torch.device
) -> dict[str, Tensor]:
    """Crop and upload frames `{view: uint8 [H, W, 3]}` of several environments; per view uint8 `[B, 3, S, S]`."""
    if not crops_on_device(device):
        return {
            view: upload(torch.stack([transform.cropped(frame[view]) for frame in frames]), device) for view in views
        }
    images = [frame[view] for view in views for frame in frames]
    # Cameras may differ in size; frames of one size are uploaded and cropped as one batch.
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(number)
    cropped: dict[int, Tensor] = {}
    for same_size in sizes.values():
        uploaded = upload(torch.from_numpy(np.stack([images[number] for number in same_size])), device)
        cropped.update(zip(same_size, transform.cropped_on_device(uploaded), strict=True))
    batch = len(frames)
    return {
        view: torch.stack([cropped[place * batch + row] for row in range(batch)]) for place, view in enumerate(views)
    }
