"""SparseVLM's rule written out with NumPy."""

from __future__ import annotations

import numpy as np


def chosen_by_the_paper(patches: np.ndarray, text: np.ndarray) -> list[int]:
    """Text tokens `[T, D]` to which patches `[P, D]` give more than the mean of their softmax."""
    relevance = np.zeros(len(text))
    for patch in patches:
        raised = np.exp(text @ patch - (text @ patch).max())
        relevance += raised / raised.sum() / len(patches)
    return [i for i, r in enumerate(relevance) if r > relevance.mean()]


def scored_by_the_paper(attention: np.ndarray, rows: list[int], heads: int | None) -> np.ndarray:
    """Mean over raters and over the heads in which they attend to patches most, of `[H, T, P]`."""
    by_head = attention[:, rows].mean(1)
    best = sorted(range(len(by_head)), key=lambda h: (-by_head[h].sum(), h))[:heads]
    return by_head[best].mean(0)
