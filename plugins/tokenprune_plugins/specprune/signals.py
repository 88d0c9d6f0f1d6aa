"""What SpecPrune looks at, one small function each; other strategies may use them as they are.

Ranks count from 0, the best first; equal values rank in the order of their original ids, so every choice is the same
on every device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokenprune.context import LayerContext, SelectContext
from tokenprune.history import ExecutedAction
from tokenprune.selection import OriginalIds

LONGEST_LOOK_BACK = 11


def travelled(executed: Sequence[ExecutedAction], dims: Sequence[int]) -> float:
    """Length of the summed translation of some executed actions, in the actions' own units; 0 for none."""
    sums = [sum(float(record.action[dim]) for record in executed) for dim in dims]
    return math.hypot(*sums)


def look_back(distance: float) -> int:
    """Control steps between the frames to compare, from 1 to 11: far apart when the arm moves slowly.

    `floor(b + k * v) + 4` with b = 7 and k = -1 (SpecPrune-VLA v3), clamped so that it never names the current frame
    or a future one.
    """
    return min(max(math.floor(7 - distance) + 4, 1), LONGEST_LOOK_BACK)


def patch_similarity(current: Tensor, past: Tensor, grid: tuple[int, int], black: float = 1.0) -> Tensor:
    """Cosine of each patch with itself in another frame, `[B, rows * cols]`, float64.

    Sums of uint8 products are exact in float64 whatever their order, so equal patches give exactly 1 and those
    exactly at a threshold fall the same way on every device.

    Args:
        current: Pixels, uint8 `[B, 3, S, S]`.
        past: Likewise.
        grid: Rows and columns of patches.
        black: Similarity of two patches that are both entirely black, which have no direction.
    """
    now, then = patches(current, grid), patches(past, grid)
    dot = (now * then).sum((3, 4, 5))
    length, past_length = (now * now).sum((3, 4, 5)), (then * then).sum((3, 4, 5))
    # The root of the product, not the product of roots, which would leave equal patches a last bit away from 1.
    cosine = dot / (length * past_length).sqrt().clamp(min=1e-8)
    return torch.where(length + past_length == 0, black, cosine).flatten(1)


def patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels `[B, 3, S, S]` by patch, float64 `[B, rows, cols, height, 3, width]`."""
    rows, cols = grid
    batch, channels, height, width = pixels.shape
    split = pixels.double().view(batch, channels, rows, height // rows, cols, width // cols)
    return split.permute(0, 2, 4, 3, 1, 5)


def frame_similarity(ctx: SelectContext, black: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine of the held patches with the frame looked back at `[B, P]`, and which rows `[B]` have such a frame."""
    found = None
    everywhere = torch.ones(len(ctx.prunable), ctx.layout.n_tokens, dtype=torch.float64, device=ctx.prunable.device)
    for view, segment in ctx.layout.views.items():
        past, found = ctx.past_images(view)
        if segment.grid is not None:
            similar = patch_similarity(ctx.images[view], past, segment.grid, black)
            everywhere[:, segment.start : segment.start + segment.length] = similar
    assert found is not None, "a layout without views has no prunable tokens"
    return everywhere.gather(1, ctx.prunable), found


def attention_to_patches(ctx: LayerContext, rows: str | range | OriginalIds) -> Tensor:
    """Attention of some queries to the held patches, mean over heads and rows `[B, P]`."""
    return ctx.attention_rows(rows).mean((1, 2))


def rank_within(score: Tensor, member: Tensor | None = None) -> Tensor:
    """Rank of each token of its row `[B, P]`, the highest finite score first.

    Where members are given, it is the rank among them, and P for the others.
    """
    n = score.shape[1]
    counted = score if member is None else torch.where(member, score, -torch.inf)
    order = counted.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(n, device=score.device).expand_as(order)
    ranks = torch.empty_like(order).scatter(1, order, places)
    return ranks if member is None else torch.where(member, ranks, n)


def rank_in_views(ctx: SelectContext, score: Tensor, member: Tensor | None = None) -> Tensor:
    """Rank of each held token within its view `[B, P]`, among the members where they are given; P for the others."""
    ranks = torch.full_like(ctx.prunable, ctx.prunable.shape[1])
    for view in ctx.layout.views:
        inside = ctx.in_view(view) if member is None else member & ctx.in_view(view)
        ranks = torch.where(inside, rank_within(score, inside), ranks)
    return ranks


def claims(ctx: SelectContext, score: Tensor, member: Tensor, top: int) -> Tensor:
    """How far down its view's order each token is, in units of `top` `[B, P]`: at most 1 for the best `top` of a view.

    Infinite for tokens that are no members. A union of the best `a * top` of several signals is exactly what claims at
    most `a`, so one order holds the unions of every size, each within the next.
    """
    return torch.where(member, (rank_in_views(ctx, score, member).double() + 1) / top, torch.inf)


def per_view(ctx: SelectContext, values: Sequence[float]) -> Tensor:
    """A number for each held token from numbers for each view in sequence order `[B, P]`; the last repeats."""
    spread = torch.zeros_like(ctx.prunable, dtype=torch.float64)
    for number, view in enumerate(ctx.layout.views):
        spread = torch.where(ctx.in_view(view), values[min(number, len(values) - 1)], spread)
    return spread


def rank_weights(n: int, decay: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weight of each rank `[n]`: the sigmoid of `-decay * rank`, over its sum."""
    weights = torch.sigmoid(-decay * torch.arange(n, dtype=dtype, device=device))
    return weights / weights.sum()


def entropy_confidence(attention: Tensor) -> Tensor:
    """One over the normalised entropy of attention `[B, H, R, P]` to the patches, a number per batch row `[B]`.

    The mean over heads of each query row is renormalised over the patches; its entropy is divided by ln P and averaged
    over rows.
    """
    shares = attention.double().mean(1)
    shares = shares / shares.sum(2, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(2) / math.log(max(shares.shape[2], 2))
    return 1 / (entropy.mean(1) + 1e-8)


def moving_average(before: Tensor, new: Tensor, beta: float) -> Tensor:
    """`(1 - beta) * before + beta * new`."""
    return (1 - beta) * before + beta * new


def in_mode(value: float | Mapping[str, float], mode: str) -> float:
    """A number that may depend on the mode."""
    return value[mode] if isinstance(value, Mapping) else value
