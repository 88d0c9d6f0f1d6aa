"""Frames of observations, cropped, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenprune.model.device import upload


class FrameTransform(Protocol):
    """How a policy prepares a camera frame."""

    def cropped(self, image: np.ndarray) -> Tensor:
        """A camera frame `[H, W, 3]` as the policy crops it, uint8 `[3, S, S]`."""
        ...

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        """What `cropped` returns, bit for bit, for a batch `[B, H, W, 3]` on a device; uint8 `[B, 3, S, S]`."""
        ...


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
