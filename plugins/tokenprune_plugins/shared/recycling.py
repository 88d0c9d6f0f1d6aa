"""SparseVLM's recycling: the best of the tokens that leave, folded into a few by density peaks."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import rows_at
from tokenprune_plugins.shared.ranks import rank_within

NEIGHBOURS = 5
"""Nearest tokens that density is measured by; ours, for want of a number at first hand."""


def recycled(leaving: int) -> tuple[int, int]:
    """Of some tokens that leave, how many are folded, the best 30 % and one, and into how many: a tenth and one."""
    folded = min(int(0.3 * leaving) + 1, leaving)
    return folded, min(folded // 10 + 1, folded)


def fold(score: Tensor, tokens: Tensor, base: int, folded: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens stay as they are, which stay as the mean of their cluster, and where each folded one goes.

    Args:
        score: `[B, P]`; of equals the lower index is better.
        tokens: What is clustered `[B, P, D]`.
        base: Tokens that stay as they are, the best.
        folded: Tokens after them that are folded.
        clusters: Centres among these.

    Returns:
        The order of staying `[B, P]`, highest for the best; destinations `[B, P]`, own for what is not folded; and
        which tokens take part in a mean or stay `[B, P]`.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    own = torch.arange(score.shape[1], device=score.device).expand_as(order)
    among = order[:, base : base + folded]
    exact = rows_at(tokens, among).to(torch.promote_types(tokens.dtype, torch.float32))
    distance = torch.cdist(exact, exact) / exact.shape[-1] ** 0.5
    centre, nearest = density_peaks(distance, clusters)
    place = rank_within(score)
    worth = torch.where(place < base, 2.0 - place / score.shape[1], 0.0)
    worth = worth.scatter(1, among.gather(1, centre), 1.0)
    destination = own.scatter(1, among, among.gather(1, centre).gather(1, nearest))
    return worth, destination, place < base + folded


def density_peaks(distance: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Centres `[B, clusters]` of tokens at distances `[B, F, F]`, and the centre each belongs to, `[B, F]` of these.

    A centre is dense (near its neighbours) and far from anything denser; of equals the lower index is denser.
    """
    count = distance.shape[1]
    near = distance.sort(dim=2).values[:, :, : min(NEIGHBOURS, count)]
    density = (-near.square().mean(2)).exp()
    rank = rank_within(density)
    denser = rank[:, None] < rank[:, :, None]
    # The densest is as far from anything denser as anything is from anything.
    furthest = distance.flatten(1).amax(1)[:, None]
    apart = torch.minimum(distance.masked_fill(~denser, torch.inf).amin(2), furthest)
    centre = (density * apart).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    to_centres = distance.gather(2, centre[:, None].expand(-1, count, -1))
    # A centre is its own, whatever lies on it.
    own = centre[:, None] == torch.arange(count, device=distance.device)[None, :, None]
    return centre, to_centres.masked_fill(own, -1.0).argmin(2)
