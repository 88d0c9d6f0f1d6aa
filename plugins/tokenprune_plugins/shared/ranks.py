"""Ranks of tokens in their row and in their view.

Ranks count from 0, the best first; equal values rank in the order of their original ids, so every choice is the same
on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune import SelectContext


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
