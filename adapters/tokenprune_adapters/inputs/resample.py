"""Pillow's resizing in torch, bit for bit, for frames that are already on a device.

Pillow resizes bytes in integers (its Resample.c): weights with 22 binary places, along the width and then the height,
rounded to bytes after each. All sums stay below 2**53, so float64 holds them exactly, and a matrix product is exact in
any order of summation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL.Image import Resampling
from torch import Tensor

Floats = npt.NDArray[np.float64]

_ONE = 1 << 22

# From 13 on, Pillow resizes the height first if many more rows than columns are removed; the bytes in between differ.
_ROWS_MAY_GO_FIRST = int(PIL.__version__.split(".")[0]) >= 13


def _triangle(x: Floats) -> Floats:
    return np.maximum(1 - abs(x), 0)


def _cubic(x: Floats) -> Floats:
    """Keys' kernel with a = -0.5; the operations in Pillow's order, so that every weight rounds as Pillow's."""
    x = abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


_KERNELS: dict[Resampling, tuple[Callable[[Floats], Floats], float]] = {
    Resampling.BILINEAR: (_triangle, 1.0),
    Resampling.BICUBIC: (_cubic, 2.0),
}


def resample(pixels: Tensor, width: int, height: int, kernel: Resampling) -> Tensor:
    """Resize a batch as `PIL.Image.Image.resize` does, without waiting for its device.

    Args:
        pixels: `[B, C, H, W]` uint8.
        width: Columns of the result, `w`.
        height: Rows of the result, `h`.
        kernel: Bilinear or bicubic.

    Returns:
        `[B, C, h, w]` uint8.
    """
    rows, columns = sides = pixels.shape[-2:]
    if sides == (height, width):
        return pixels
    exact = pixels.to(torch.float64, memory_format=torch.contiguous_format)
    for dim, after in _passes(rows, columns, height, width):
        weights = _weights(sides[dim], after, kernel, pixels.device)
        exact = weights @ exact if dim == 0 else exact @ weights.mT
        # Pillow rounds by adding a half and truncating.
        exact = ((exact + _ONE // 2) / _ONE).floor().clamp(0, 255)
    return exact.to(torch.uint8)


def _passes(rows: int, columns: int, height: int, width: int) -> list[tuple[int, int]]:
    """The dimensions that change (0 for rows, 1 for columns) with their new sizes, in Pillow's order."""
    order = [(0, rows, height), (1, columns, width)]
    removed = rows - height
    if not (_ROWS_MAY_GO_FIRST and removed > 0 and removed > 2 * (columns - width)):
        order.reverse()
    return [(dim, after) for dim, before, after in order if before != after]


@lru_cache(maxsize=64)
def _weights(before: int, after: int, kernel: Resampling, device: torch.device) -> Tensor:  # cold: once per size
    """Return the weights of each source pixel in each output pixel in 2**-22, whole numbers `[after, before]`."""
    shape, reach = _KERNELS[kernel]
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after)[:, None] + 0.5) * scale
    source = np.arange(before)
    # The conversion truncates like C's; below 0 there is no source pixel.
    first, end = ((centre + sign * reach * stretch + 0.5).astype(np.int64) for sign in (-1, 1))
    weights = np.where((source >= first) & (source < end), shape((source - centre + 0.5) * (1 / stretch)), 0)
    # Pillow adds one after the other; `sum` adds in pairs, and a different last bit could change a weight.
    weights /= weights.cumsum(1)[:, -1:]
    whole = np.trunc(weights * _ONE + np.copysign(0.5, weights))
    return torch.from_numpy(whole).to(device)
