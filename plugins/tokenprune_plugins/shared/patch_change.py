"""Pixel similarity of each patch with the same patch in another frame."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import SelectContext


def patch_similarity(current: Tensor, past: Tensor, grid: tuple[int, int], black: float = 1.0) -> Tensor:
    """Cosine similarity of each patch with the same patch in another frame, float64 `[B, rows * cols]`.

    Sums of uint8 products are exact in float64 in any order. So equal patches give exactly 1, and a comparison with a
    threshold gives the same answer on every device.

    Args:
        current: Pixels of this frame, uint8 `[B, 3, S, S]`.
        past: Pixels of the other frame, uint8 `[B, 3, S, S]`.
        grid: Rows and columns of patches.
        black: Similarity of two patches that are both entirely black, whose cosine is not defined.
    """
    now, then = patches(current, grid), patches(past, grid)
    dot = (now * then).sum((3, 4, 5))
    length, past_length = (now * now).sum((3, 4, 5)), (then * then).sum((3, 4, 5))
    # The product of two square roots may differ from 1 by a rounding error for equal patches; this one does not.
    cosine = dot / (length * past_length).sqrt().clamp(min=1e-8)
    return torch.where(length + past_length == 0, black, cosine).flatten(1)


def patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels `[B, 3, S, S]` split into patches, float64 `[B, rows, cols, height, 3, width]`."""
    rows, cols = grid
    batch, channels, height, width = pixels.shape
    split = pixels.double().view(batch, channels, rows, height // rows, cols, width // cols)
    return split.permute(0, 2, 4, 3, 1, 5)


def frame_similarity(ctx: SelectContext, black: float = 1.0) -> tuple[Tensor, Tensor]:
    """Similarity of the held patches to the look-back frame `[B, P]`, and which batch rows `[B]` have such a frame."""
    found = None
    everywhere = torch.ones(len(ctx.prunable), ctx.layout.n_tokens, dtype=torch.float64, device=ctx.prunable.device)
    for view, segment in ctx.layout.views.items():
        past, found = ctx.past_images(view)
        if segment.grid is not None:
            similar = patch_similarity(ctx.images[view], past, segment.grid, black)
            everywhere[:, segment.start : segment.start + segment.length] = similar
    assert found is not None, "a layout without views has no prunable tokens"
    return everywhere.gather(1, ctx.prunable), found
