"""DivPrune's rule written out with NumPy."""

from __future__ import annotations

import numpy as np


def chosen_by_the_paper(embeddings: np.ndarray, count: int) -> list[int]:
    """Greedy max-min diversity of rows `[P, D]`; of equals the lower index."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    chosen: list[int] = []
    while len(chosen) < count:
        left = [i for i in range(len(unit)) if i not in chosen]
        others = chosen or list(range(len(unit)))
        worth = [min((distance[i, j] for j in others if j != i), default=np.inf) for i in left]
        chosen.append(left[int(np.argmax(worth))])
    return chosen
