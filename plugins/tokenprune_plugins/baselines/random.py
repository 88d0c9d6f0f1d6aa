"""A baseline that keeps tokens at random."""

from __future__ import annotations

from torch import Tensor

from tokenprune import SelectContext
from tokenprune_plugins.shared.bases import HalfConfig, ScoreStage


class Random(ScoreStage[HalfConfig]):
    """Keeps tokens at random, a new choice in every query.

    The scores are a hash of seed, query and original id. So they are the same on every device and for every batch size,
    and do not depend on any other random numbers.
    """

    Config = HalfConfig

    def score(self, ctx: SelectContext) -> Tensor:
        """Uniform random numbers `[B, P]`."""
        return hashed(ctx.prunable, ctx.seeds[:, None])


def hashed(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each id, from a 64-bit integer hash (overflow is intended)."""
    mixed = (ids + seeds) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return (mixed >> 11 & 0x1FFFFFFFFFFFFF).double() / 2**53
