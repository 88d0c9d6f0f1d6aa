"""Baselines without which no comparison means anything: nothing, chance, and an even grid."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.config import CutConfig, Keep
from tokenprune.context import LayerContext, SelectContext
from tokenprune.hookspecs import hookimpl
from tokenprune.layout import TokenLayout
from tokenprune.selection import Proposal
from tokenprune.stage import Stage
from tokenprune_plugins.scored import Scored


class NothingConfig(CutConfig):
    """A cut that keeps everything."""

    keep: Keep = 1.0


class HalfConfig(CutConfig):
    """A cut that keeps half unless told otherwise."""

    keep: Keep = 0.5


class Nothing(Stage[NothingConfig]):
    """Abstains wherever it is asked, so a query runs through every call and no token leaves."""

    Config = NothingConfig

    @hookimpl
    def select_tokens(self, ctx: SelectContext) -> Proposal | None:
        """Abstain."""
        return None

    @hookimpl
    def score_layer(self, ctx: LayerContext) -> Proposal | None:
        """Abstain."""
        return None


class Random(Scored[HalfConfig]):
    """Scores tokens at random, anew in every query.

    The numbers are a hash of seed, query and original id, so they are the same on every device, for every batch
    size, and whatever else draws random numbers.
    """

    Config = HalfConfig

    def score(self, ctx: SelectContext) -> Tensor:
        """Uniform numbers."""
        return hashed(ctx.prunable, ctx.seeds[:, None])


class UniformGrid(Scored[HalfConfig]):
    """Keeps patches spread evenly over each view, equally many of every view.

    Patches are ranked by an ordered-dither pattern, so each larger keep contains every smaller one.
    """

    Config = HalfConfig

    def __init__(self, config: HalfConfig) -> None:
        """Tables are made at the first query of each layout."""
        super().__init__(config)
        self._tables: dict[tuple[TokenLayout, torch.device], Tensor] = {}

    def score(self, ctx: SelectContext) -> Tensor:
        """The place of each patch in its view's pattern."""
        key = (ctx.layout, ctx.prunable.device)
        if key not in self._tables:
            self._tables[key] = grid_scores(ctx.layout).to(ctx.prunable.device)
        return self._tables[key][ctx.prunable]


def hashed(ids: Tensor, seeds: Tensor | int) -> Tensor:
    """Uniform float64 numbers in [0, 1), one per id, from a 64-bit integer hash (wrap-around is intended)."""
    mixed = (ids + seeds) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return (mixed >> 11 & 0x1FFFFFFFFFFFFF).double() / 2**53


def grid_scores(layout: TokenLayout) -> Tensor:
    """Score of every original id `[N]`; within a view, the next best patch lies farthest from those taken.

    A view without a grid is spread along its length.
    """
    scores = torch.zeros(layout.n_tokens, dtype=torch.float64)
    for segment in layout.views.values():
        rows, cols = segment.grid or (1, segment.length)
        rank = dither(rows, cols).flatten().argsort().argsort()
        scores[segment.start : segment.start + segment.length] = 1 - (rank.double() + 0.5) / segment.length
    return scores


def dither(rows: int, cols: int) -> Tensor:
    """Ordered-dither thresholds `[rows, cols]`: the interleaved, reversed bits of row and row-xor-column (Bayer)."""
    bits = max(rows - 1, cols - 1, 1).bit_length()
    row, col = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    value = torch.zeros(rows, cols, dtype=torch.int64)
    for bit in range(bits):
        mixed, plain = (row ^ col) >> bit & 1, (row >> bit & 1).expand(rows, cols)
        value = value << 2 | mixed << 1 | plain
    return value
