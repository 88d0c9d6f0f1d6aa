"""Observations for queries in a row."""

from __future__ import annotations

from typing import Any

import numpy as np


def look(backbone: Any, seed: int) -> dict[str, Any]:
    """Noise whose left half never changes."""
    rng = np.random.default_rng(seed)
    images = {}
    for view in backbone.info.views:
        images[view] = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        images[view][:, :48] = 7
    state = {} if backbone.info.state_size is None else {"state": rng.normal(size=backbone.info.state_size) * 0.1}
    return {"images": images, **state}
