"""Edges of pictures by Canny's detector, in whole numbers and fixed shapes.

What OpenCV's `Canny` does by default: Sobel's three by three on replicated borders, no blur, the sum of the absolute
derivatives as strength, and four directions, told apart by the same fixed-point tangents, which for bytes come to the
true ones. All of it is exact integer arithmetic, so every device finds the same edges. Two things may differ. Grey is
the nearest whole number to 0.299 R + 0.587 G + 0.114 B, halves up, where OpenCV rounds the weights first and so may be
off by one. And a weak edge is followed for `REACH` pixels from a strong one, where OpenCV follows it to its end: where
that is is known only when it is reached, and to ask would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

REACH = 64


_TANGENT = 13573
"""Tangent of 22.5 degrees in fractions of 2 ** 15; that of 67.5 degrees is larger by exactly 2."""


def canny(pixels: Tensor, low: int, high: int, reach: int = REACH) -> Tensor:
    """Edge pixels, boolean `[B, H, W]`, of pictures uint8 `[B, 3, H, W]`.

    Args:
        pixels: Red, green and blue.
        low: An edge is stronger than this.
        high: And, itself or a pixel it is connected to within `reach` steps, stronger than this.
        reach: Steps, each to one of eight neighbours.
    """
    dx, dy = sobel(grey(pixels))
    strength = dx.abs() + dy.abs()
    thin = (strength > low) & ridge(dx, dy, strength)
    return connected(thin & (strength > high), thin, reach)


def grey(pixels: Tensor) -> Tensor:
    """Grey values int32 `[B, H, W]`, 0 to 255, of `[B, 3, H, W]`."""
    red, green, blue = pixels.int().unbind(1)
    return (299 * red + 587 * green + 114 * blue + 500) // 1000


def sobel(values: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives to the right and downwards, each `[B, H, W]`; the border is continued by its own values."""
    values = torch.cat([values[:, :1], values, values[:, -1:]], 1)
    values = torch.cat([values[:, :, :1], values, values[:, :, -1:]], 2)
    down = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    across = values[:, :, :-2] + 2 * values[:, :, 1:-1] + values[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def ridge(dx: Tensor, dy: Tensor, strength: Tensor) -> Tensor:
    """Where the strength `[B, H, W]` is greatest across the edge; beyond the picture it is 0.

    Of two equal neighbours along a row or a column the right or lower one gives way, along a diagonal both do.
    """
    around = pad(strength, (1, 1, 1, 1))
    height, width = strength.shape[1:]

    def beside(down: int, right: int) -> Tensor:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, steep = dx.abs() * _TANGENT, dy.abs() << 15
    falling = (dx < 0) == (dy < 0)
    diagonal = torch.where(
        falling,
        (strength > beside(-1, -1)) & (strength > beside(1, 1)),
        (strength > beside(-1, 1)) & (strength > beside(1, -1)),
    )
    along_row = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    along_column = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    across = torch.where(steep > flat + (dx.abs() << 16), along_column, diagonal)
    return torch.where(steep < flat, along_row, across)


def connected(strong: Tensor, thin: Tensor, reach: int) -> Tensor:
    """Pixels of `thin` that at most `reach` steps within it lead to from a strong one, boolean `[B, H, W]`."""
    around = pad(strong, (1, 1, 1, 1))
    for _ in range(reach):
        tall = around[:, :-2] | around[:, 1:-1] | around[:, 2:]
        beside = tall[:, :, :-2] | tall[:, :, 1:-1] | tall[:, :, 2:]
        strong = strong | (thin & beside)
        around = pad(strong, (1, 1, 1, 1))
    return strong
