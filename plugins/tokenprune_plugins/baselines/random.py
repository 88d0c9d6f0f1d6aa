"""A control that keeps tokens at random."""

from __future__ import annotations

from torch import Tensor

from tokenprune import SelectContext
from tokenprune_plugins.shared.bases import HalfConfig, Scored


class Random(Scored[HalfConfig]):
    """Scores tokens at random, anew in every query.

    The numbers are a hash of seed, query and original id, so they are the same on every device, for every batch
    size, and whatever else draws random numbers.
    """

    Config = HalfConfig

    def score(self, ctx: SelectContext) -> Tensor:
        """Uniform numbers."""
        return hashed(ctx.prunable, ctx.seeds[:, None])


def hashed(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """Uniform float64 numbers in [0, 1), one per id, from a 64-bit integer hash (wrap-around is intended)."""
    mixed = (ids + seeds) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return (mixed >> 11 & 0x1FFFFFFFFFFFFF).double() / 2**53
