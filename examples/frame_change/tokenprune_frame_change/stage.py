"""Keeps the patches whose pixels changed most since the previous query."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokenprune import CutConfig, Keep, Proposal, SelectContext, Stage, hookimpl


class FrameChangeConfig(CutConfig):
    """A cut that keeps half of the patches by default."""

    keep: Keep = 0.5


class FrameChange(Stage[FrameChangeConfig]):
    """Scores each patch by the mean absolute change of its pixel values, 0 to 255.

    Patches that changed equally, and all patches of the first query, are ranked by a fixed even pattern. So a static
    scene keeps patches everywhere, not only at the top.
    """

    Config = FrameChangeConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal:
        """Score the prunable tokens `[B, P]` by change."""
        scores = torch.zeros(len(ctx.prunable), ctx.layout.n_tokens, device=ctx.prunable.device)
        for view, segment in ctx.layout.views.items():
            previous, had_one = ctx.previous_images(view)
            change = (ctx.images[view].float() - previous.float()).abs().mean(1, keepdim=True)
            change = change * had_one[:, None, None, None]
            rows, cols = segment.grid or (1, segment.length)
            patches = adaptive_avg_pool2d(change, (rows, cols)).flatten(1)
            # A change of one pixel by one grey level moves the mean by more than the whole pattern does.
            pattern = 1e-4 * even_pattern(rows, cols, change.device)
            scores[:, segment.start : segment.start + segment.length] = patches + pattern
        return Proposal(score=scores.gather(1, ctx.prunable))


def even_pattern(rows: int, cols: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) `[rows * cols]`; the largest of them, however many, are spread evenly over the grid.

    They are the fractional parts of a plane with the slopes 1/p and 1/p², p = 1.3247 (the plastic number).
    """
    row, col = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    return ((row * 0.7548777 + col * 0.5698403) % 1).flatten()
