"""Ranks of tokens in their batch row and in their view.

Ranks count from 0 for the best. Equal values rank in the order of their original ids, so the choice is the same on
every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune import SelectContext


def rank_within(score: Tensor, member: Tensor | None = None) -> Tensor:
    """Rank of each token in its batch row `[B, P]`, the highest score first.

    Args:
        score: Finite scores `[B, P]`.
        member: Boolean `[B, P]`: the tokens to rank among themselves; the others get rank P. All where left out.
    """
    n = score.shape[1]
    eligible = score if member is None else torch.where(member, score, -torch.inf)
    order = eligible.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(n, device=score.device).expand_as(order)
    ranks = torch.empty_like(order).scatter(1, order, places)
    return ranks if member is None else torch.where(member, ranks, n)


def rank_in_views(ctx: SelectContext, score: Tensor, member: Tensor | None = None) -> Tensor:
    """Rank of each held token within its view `[B, P]`; `member` as for `rank_within`."""
    ranks = torch.full_like(ctx.prunable, ctx.prunable.shape[1])
    views = ctx.views_of
    for number in range(len(ctx.layout.views)):
        inside = views == number if member is None else member & (views == number)
        ranks = torch.where(inside, rank_within(score, inside), ranks)
    return ranks


def claims(ctx: SelectContext, score: Tensor, member: Tensor, top: int) -> Tensor:
    """Claims `[B, P]`: `(rank in the view + 1) / top`, so at most 1 for the best `top` of each view.

    Tokens that are no members claim infinity. The union of the best `a * top` tokens of several signals is the set of
    tokens whose smallest claim is at most `a`. So one order gives the unions of all sizes, each a subset of the next.
    """
    return torch.where(member, (rank_in_views(ctx, score, member).double() + 1) / top, torch.inf)


def per_view(ctx: SelectContext, values: Sequence[float]) -> Tensor:
    """The value of each held token's view `[B, P]`; values are in sequence order of views, the last one repeats."""
    expanded = torch.zeros_like(ctx.prunable, dtype=torch.float64)
    views = ctx.views_of
    for number in range(len(ctx.layout.views)):
        expanded = torch.where(views == number, values[min(number, len(values) - 1)], expanded)
    return expanded
