"""Canny edge detection in integer arithmetic with fixed shapes.

It computes what OpenCV's `Canny` does by default: 3 x 3 Sobel derivatives with replicated borders, no blur, the sum of
the absolute derivatives as gradient magnitude, and four gradient directions. Integer arithmetic is exact, so every
device finds the same edges. It differs from OpenCV in two ways:

- Grey is 0.299 R + 0.587 G + 0.114 B, rounded to the nearest integer; OpenCV rounds the weights first, so its grey may
  differ by one.
- Hysteresis follows a weak edge for `REACH` pixels from a strong one; OpenCV follows it to its end. A loop until
  nothing changes would wait for the device in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

REACH = 64
"""Pixels over which hysteresis follows a weak edge."""

_TANGENT = 13573
"""Tangent of 22.5 degrees as a fixed-point number with 15 fractional bits; that of 67.5 degrees is larger by 2."""


def canny(pixels: Tensor, low: int, high: int, reach: int = REACH) -> Tensor:
    """Edge pixels, boolean `[B, H, W]`.

    Args:
        pixels: RGB pictures, uint8 `[B, 3, H, W]`.
        low: Gradient magnitude that every edge pixel exceeds.
        high: Gradient magnitude that an edge pixel, or one connected to it within `reach` steps, exceeds.
        reach: Steps of hysteresis, each to the eight neighbours.
    """
    dx, dy = sobel(grey(pixels))
    strength = dx.abs() + dy.abs()
    thin = (strength > low) & non_maximum_suppression(dx, dy, strength)
    return hysteresis(thin & (strength > high), thin, reach)


def grey(pixels: Tensor) -> Tensor:
    """Grey values int32 `[B, H, W]`, 0 to 255, of `[B, 3, H, W]`."""
    red, green, blue = pixels.int().unbind(1)
    return (299 * red + 587 * green + 114 * blue + 500) // 1000


def sobel(values: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivative, each `[B, H, W]`; border values are replicated."""
    values = torch.cat([values[:, :1], values, values[:, -1:]], 1)
    values = torch.cat([values[:, :, :1], values, values[:, :, -1:]], 2)
    down = values[:, :-2] + 2 * values[:, 1:-1] + values[:, 2:]
    across = values[:, :, :-2] + 2 * values[:, :, 1:-1] + values[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def non_maximum_suppression(dx: Tensor, dy: Tensor, strength: Tensor) -> Tensor:
    """Pixels whose gradient magnitude is the largest across the edge, boolean `[B, H, W]`.

    Outside the picture the magnitude is 0. Of two equal neighbours in a row or a column the left or upper one stays;
    of two on a diagonal neither does.
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


def hysteresis(strong: Tensor, thin: Tensor, reach: int) -> Tensor:
    """Pixels of `thin` within `reach` steps of a strong pixel, each step within `thin`, boolean `[B, H, W]`."""
    around = pad(strong, (1, 1, 1, 1))
    for _ in range(reach):
        tall = around[:, :-2] | around[:, 1:-1] | around[:, 2:]
        beside = tall[:, :, :-2] | tall[:, :, 1:-1] | tall[:, :, 2:]
        strong = strong | (thin & beside)
        around = pad(strong, (1, 1, 1, 1))
    return strong
