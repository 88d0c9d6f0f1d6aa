"""Canny's edge detector written out pixel by pixel, as OpenCV runs it by default, with true tangents."""

from __future__ import annotations

import numpy as np


def naive_canny(pixels: np.ndarray, low: int, high: int, reach: int | None = None) -> np.ndarray:
    """Edge pixels `[H, W]` of uint8 `[3, H, W]`; with `reach`, weak ones at most so many steps from a strong one."""
    height, width = pixels.shape[1:]
    grey = [[naive_grey(*map(int, pixels[:, y, x])) for x in range(width)] for y in range(height)]

    def at(y: int, x: int) -> int:
        return grey[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)]

    across, along, strength = {}, {}, {}
    for y in range(height):
        for x in range(width):
            dx = sum(w * (at(y + d, x + 1) - at(y + d, x - 1)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            dy = sum(w * (at(y + 1, x + d) - at(y - 1, x + d)) for d, w in ((-1, 1), (0, 2), (1, 1)))
            across[y, x], along[y, x], strength[y, x] = dx, dy, abs(dx) + abs(dy)

    thin = set()
    for (y, x), m in strength.items():
        dx, dy = across[y, x], along[y, x]
        # tan 22.5 = sqrt 2 - 1 and tan 67.5 = sqrt 2 + 1, squared so that nothing is rounded.
        if (abs(dx) + abs(dy)) ** 2 < 2 * dx**2:
            before, after, strict = (y, x - 1), (y, x + 1), False
        elif abs(dy) > abs(dx) and (abs(dy) - abs(dx)) ** 2 > 2 * dx**2:
            before, after, strict = (y - 1, x), (y + 1, x), False
        else:
            turn = -1 if (dx < 0) != (dy < 0) else 1
            before, after, strict = (y - 1, x - turn), (y + 1, x + turn), True
        first, second = strength.get(before, 0), strength.get(after, 0)
        if m > low and m > first and (m > second if strict else m >= second):
            thin.add((y, x))

    edges = np.zeros((height, width), dtype=bool)
    stack = [(point, 0) for point in thin if strength[point] > high]
    nearest = dict(stack)
    while stack:
        (y, x), steps = stack.pop()
        edges[y, x] = True
        for point in ((y + d, x + e) for d in (-1, 0, 1) for e in (-1, 0, 1)):
            further = (reach is None or steps < reach) and steps + 1 < nearest.get(point, len(thin) + 1)
            if point in thin and further:
                nearest[point] = steps + 1
                stack.append((point, steps + 1))
    return edges


def naive_grey(red: int, green: int, blue: int) -> int:
    """The nearest whole number, halves up."""
    whole, part = divmod(299 * red + 587 * green + 114 * blue, 1000)
    return whole + (part >= 500)
