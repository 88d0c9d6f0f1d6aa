"""Keeps the patches whose pixels changed most since the previous query."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokenprune import CutConfig, Keep, Proposal, SelectContext, Stage, hookimpl


class FrameChangeConfig(CutConfig):
    """A cut before the first layer that keeps half unless told otherwise."""

    keep: Keep = 0.5


class FrameChange(Stage[FrameChangeConfig]):
    """Scores each patch by the mean absolute change of its pixels, 0 to 255.

    Patches that changed equally, and all patches of a query without a previous one, are ordered by a fixed pattern that
    is even over the view, so that a still scene is thinned out and not cut off at the bottom.
    """

    Config = FrameChangeConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Change of each prunable patch, `[B, P]`."""
        table = torch.zeros(len(ctx.prunable), ctx.layout.n_tokens, device=ctx.prunable.device)
        for view, segment in ctx.layout.views.items():
            previous, had_one = ctx.previous_images(view)
            change = (ctx.images[view].float() - previous.float()).abs().mean(1, keepdim=True) * had_one[
                :, None, None, None
            ]
            rows, cols = segment.grid or (1, segment.length)
            patches = adaptive_avg_pool2d(change, (rows, cols)).flatten(1)
            # One grey level of one pixel moves the mean by more than the whole pattern.
            table[:, segment.start : segment.start + segment.length] = patches + 1e-4 * even(rows, cols, change.device)
        return Proposal(score=table.gather(1, ctx.prunable))


def even(rows: int, cols: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) `[rows * cols]` of which the largest, however many, lie evenly over the grid.

    They are the fractional parts of a plane with the slopes 1/p and 1/p², p = 1.3247 (the plastic number).
    """
    row, col = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    return ((row * 0.7548777 + col * 0.5698403) % 1).flatten()
