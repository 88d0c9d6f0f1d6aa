"""Image preprocessing of pi0: the whole frame, resized to fit a square and padded with black."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from tokenprune_adapters.inputs.resample import resample


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
        left, top, width, height = self._geometry(*frame.size)
        square = Image.new("RGB", (self.size, self.size))
        square.paste(frame.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        return torch.from_numpy(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)))

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        """Do what `cropped` does, bit for bit, for a batch on its device and without waiting for the device.

        Args:
            frames: `[B, H, W, 3]` uint8 RGB.

        Returns:
            `[B, 3, S, S]` uint8.
        """
        pixels = frames.permute(0, 3, 1, 2)
        left, top, width, height = self._geometry(pixels.shape[3], pixels.shape[2])
        resized = resample(pixels, width, height, Image.Resampling.BILINEAR)
        return pad(resized, (left, self.size - width - left, top, self.size - height - top)).contiguous()

    def _geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of the resized frame in the square."""
        # In floating point and truncated, like upstream's: a side can be one pixel shorter than its exact length.
        ratio = max(width / self.size, height / self.size)
        width, height = max(1, int(width / ratio)), max(1, int(height / ratio))
        return (self.size - width) // 2, (self.size - height) // 2, width, height

    def normalise(self, pixels: Tensor, tower: int, dtype: torch.dtype) -> Tensor:
        """Scale a batch to [-1, 1], on its device and without waiting for the device.

        Args:
            pixels: `[B, 3, S, S]` uint8.
            tower: Index of the tower, 0; pi0 has one.
            dtype: Type of the result; the arithmetic is float32.

        Returns:
            `[B, 3, S, S]`; the padding is -1.
        """
        return (pixels.float() / 255 * 2 - 1).to(dtype)
