"""SparseVLM's recycling: density-peak clusters of the best tokens that leave, each kept as its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune import rows_at
from tokenprune_plugins.shared.ranks import rank_within

NEIGHBOURS = 5
"""Nearest tokens that the density is measured by; our choice, as the paper's number could not be read at first hand."""


def recycling_counts(leaving: int) -> tuple[int, int]:
    """Tokens to recycle of those that leave, 30 % and one more; and clusters to form of them, a tenth and one more."""
    recycled = min(int(0.3 * leaving) + 1, leaving)
    return recycled, min(recycled // 10 + 1, recycled)


def recycle(score: Tensor, tokens: Tensor, base: int, recycled: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters the tokens that rank after the `base` best.

    Args:
        score: Scores `[B, P]`; of equal ones the lower index ranks first.
        tokens: Features to cluster `[B, P, D]`.
        base: Tokens that stay unchanged, the best ones.
        recycled: Tokens to cluster, the next best ones.
        clusters: Clusters to form; the centre of each stays as its mean.

    Returns:
        New scores `[B, P]`, highest for the tokens that stay unchanged, then for the centres; the token `[B, P]` that
        each token merges into, itself where it is not clustered; and which tokens stay or are clustered `[B, P]`.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    own = torch.arange(score.shape[1], device=score.device).expand_as(order)
    members = order[:, base : base + recycled]
    features = rows_at(tokens, members).to(torch.promote_types(tokens.dtype, torch.float32))
    distance = torch.cdist(features, features) / features.shape[-1] ** 0.5
    centre, nearest = density_peaks(distance, clusters)
    rank = rank_within(score)
    new_score = torch.where(rank < base, 2.0 - rank / score.shape[1], 0.0)
    new_score = new_score.scatter(1, members.gather(1, centre), 1.0)
    destination = own.scatter(1, members, members.gather(1, centre).gather(1, nearest))
    return new_score, destination, rank < base + recycled


def density_peaks(distance: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density-peak clustering of tokens by their distances `[B, F, F]`.

    A centre is dense (near its neighbours) and far from every denser token. Of equally dense tokens the lower index
    counts as denser.

    Returns:
        Indices of the centres `[B, clusters]`, and the number of each token's cluster `[B, F]`.
    """
    count = distance.shape[1]
    near = distance.sort(dim=2).values[:, :, : min(NEIGHBOURS, count)]
    density = (-near.square().mean(2)).exp()
    rank = rank_within(density)
    denser = rank[:, None] < rank[:, :, None]
    # No token is denser than the densest, so it gets the largest distance of all pairs.
    furthest = distance.flatten(1).amax(1)[:, None]
    apart = torch.minimum(distance.masked_fill(~denser, torch.inf).amin(2), furthest)
    centre = (density * apart).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    to_centres = distance.gather(2, centre[:, None].expand(-1, count, -1))
    # A centre belongs to its own cluster even where another centre has the same features.
    own = centre[:, None] == torch.arange(count, device=distance.device)[None, :, None]
    return centre, to_centres.masked_fill(own, -1.0).argmin(2)
