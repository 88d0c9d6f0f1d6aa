"""Frames of observations, cropped, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenprune.model.device import upload


class Cropping(Protocol):
    """An image transform."""

    def cropped(self, image: np.ndarray) -> Tensor:
        """A camera frame `[H, W, 3]` as the policy crops it, uint8 `[3, S, S]`."""
        ...

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        """The same, bit for bit, of frames uint8 `[B, H, W, 3]` on a device; uint8 `[B, 3, S, S]`."""
        ...


def crops_on_device(device: torch.device) -> bool:
    """Whether frames are uploaded as they are and cropped there; a CPU is faster with Pillow."""
    return device.type == "cuda"


def upload_frames(
    frames: Sequence[Mapping[str, np.ndarray]], views: Sequence[str], transform: Cropping, device: torch.device
) -> dict[str, Tensor]:
    """Crop frames `{view: uint8 [H, W, 3]}` of several environments; per view uint8 `[B, 3, S, S]` on the device."""
    if not crops_on_device(device):
        return {
            view: upload(torch.stack([transform.cropped(frame[view]) for frame in frames]), device) for view in views
        }
    images = [frame[view] for view in views for frame in frames]
    # Cameras may differ in size; what is of one size goes up together and is cropped together.
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(number)
    cropped: dict[int, Tensor] = {}
    for alike in sizes.values():
        together = upload(torch.from_numpy(np.stack([images[number] for number in alike])), device)
        cropped.update(zip(alike, transform.cropped_on_device(together), strict=True))
    batch = len(frames)
    return {
        view: torch.stack([cropped[place * batch + row] for row in range(batch)]) for place, view in enumerate(views)
    }
