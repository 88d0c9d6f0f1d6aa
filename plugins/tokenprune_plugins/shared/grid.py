"""Scores that spread kept patches evenly over each view's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import TokenLayout


def grid_scores(layout: TokenLayout) -> Tensor:
    """Score of every original id `[N]`: in each view the best patches, however many, are spread evenly over the grid.

    In a view without a grid they are spread along its length. Ids outside the views score 0.
    """
    scores = torch.zeros(layout.n_tokens, dtype=torch.float64)
    for segment in layout.views.values():
        rows, cols = segment.grid or (1, segment.length)
        rank = dither(rows, cols).flatten().argsort().argsort()
        scores[segment.start : segment.start + segment.length] = 1 - (rank.double() + 0.5) / segment.length
    return scores


def dither(rows: int, cols: int) -> Tensor:
    """Bayer matrix `[rows, cols]` of ordered dithering: interleaved, reversed bits of `row` and `row ^ col`."""
    bits = max(rows - 1, cols - 1, 1).bit_length()
    row, col = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    value = torch.zeros(rows, cols, dtype=torch.int64)
    for bit in range(bits):
        mixed, plain = (row ^ col) >> bit & 1, (row >> bit & 1).expand(rows, cols)
        value = value << 2 | mixed << 1 | plain
    return value
