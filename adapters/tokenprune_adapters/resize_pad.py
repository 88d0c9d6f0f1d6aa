"""pi0's image transform: the whole frame, scaled to fit a square and padded with black."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ResizePad:
    """How pi0 and pi0.5 prepare an image at inference (upstream openpi, `resize_with_pad`).

    Attributes:
        size: Side `S` of the square image the tower reads, in pixels.
    """

    size: int = 224

    def cropped(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Scale one camera frame to fit the square, bilinear, and pad it evenly on both sides.

        Args:
            image: `[H, W, 3]` uint8 RGB, as `check_image` returns it.

        Returns:
            `[3, S, S]` uint8: the pixels that the tower and the stages see; the padding is 0.
        """
        frame = Image.fromarray(image)
        # In floating point and truncated, as upstream: a side can come out a pixel short of its exact length.
        ratio = max(frame.width / self.size, frame.height / self.size)
        width, height = max(1, int(frame.width / ratio)), max(1, int(frame.height / ratio))
        square = Image.new("RGB", (self.size, self.size))
        resized = frame.resize((width, height), Image.Resampling.BILINEAR)
        square.paste(resized, ((self.size - width) // 2, (self.size - height) // 2))
        return torch.from_numpy(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)))

    def normalise(self, pixels: Tensor, tower: int, dtype: torch.dtype) -> Tensor:
        """Scale a batch to [-1, 1], on the device it lies on and without waiting for it.

        Args:
            pixels: `[B, 3, S, S]` uint8.
            tower: Index of the tower, 0; pi0 has one.
            dtype: Type of the result; the arithmetic is float32.

        Returns:
            `[B, 3, S, S]`; the padding is -1.
        """
        return (pixels.float() / 255 * 2 - 1).to(dtype)
