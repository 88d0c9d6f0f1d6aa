"""Which tokens are kept, by their ids in the unpruned sequence.

The two index spaces have a type each: `OriginalIds` are positions in the unpruned sequence, `CurrentIds` positions
among the tokens a layer holds now. Pure tensor functions; no shape depends on data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

import torch
from torch import Tensor

from tokenprune.errors import SelectionError

if TYPE_CHECKING:
    OriginalIds = NewType("OriginalIds", Tensor)
    CurrentIds = NewType("CurrentIds", Tensor)
else:
    # NewType at run time, in a form that torch.compile can trace.
    def OriginalIds(ids):  # noqa: ANN001, ANN201, D103
        return ids

    CurrentIds = OriginalIds


@dataclass(frozen=True, slots=True)
class TokenSelection:
    """The kept tokens of a sequence.

    Attributes:
        ids: Kept original indices `[B, K]`, int64, strictly increasing along the row.
        n_source: Length of the unpruned sequence.
    """

    ids: OriginalIds
    n_source: int

    @classmethod
    def identity(cls, n_source: int, batch: int, device: torch.device | str = "cpu") -> TokenSelection:
        """Keep everything."""
        return cls(OriginalIds(torch.arange(n_source, device=device).expand(batch, n_source)), n_source)

    @property
    def n_kept(self) -> int:
        """Tokens kept per batch row."""
        return self.ids.shape[1]

    def compose(self, inner: TokenSelection) -> TokenSelection:
        """Apply a further selection, whose ids are positions within this one.

        Raises:
            SelectionError: If `inner` was made for another number of tokens.
        """
        if inner.n_source != self.n_kept:
            raise SelectionError(f"a selection of {inner.n_source} tokens cannot follow one that keeps {self.n_kept}")
        return TokenSelection(self.to_original(CurrentIds(inner.ids)), self.n_source)

    def to_original(self, current: CurrentIds) -> OriginalIds:
        """Map current indices `[B, M]` to original ones."""
        return OriginalIds(self.ids.gather(1, current))

    def to_current(self, original: OriginalIds) -> CurrentIds:
        """Map original indices `[B, M]` of tokens that are kept to current ones."""
        return CurrentIds(torch.searchsorted(self.ids.contiguous(), original.contiguous()))

    def seen(self) -> Tensor:
        """Boolean `[B, n_source]`, true where a token is kept."""
        mask = torch.zeros(self.ids.shape[0], self.n_source, dtype=torch.bool, device=self.ids.device)
        return mask.scatter(1, self.ids, True)


def others(chosen: Tensor, n: int) -> Tensor:
    """Indices `[B, n - K]` below `n` that are not in `chosen` `[B, K]`, strictly increasing."""
    taken = torch.zeros(len(chosen), n, dtype=torch.int64, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : n - chosen.shape[1]]


def rows_at(values: Tensor, at: Tensor) -> Tensor:
    """Rows `[B, M, D]` of `values` `[B, n, D]` at indices `at` `[B, M]`; faster than an elementwise gather."""
    batch, n, width = values.shape
    first = torch.arange(batch, device=values.device)[:, None] * n
    return values.reshape(batch * n, width).index_select(0, (at + first).flatten()).view(batch, -1, width)


def head_rows_at(values: Tensor, at: Tensor) -> Tensor:
    """Rows `[B, H, M, d]` of `values` `[B, H, n, d]` at indices `at` `[B, M]`."""
    return values.gather(2, at[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))


def key_columns_at(weights: Tensor, at: Tensor) -> Tensor:
    """Columns `[B, H, R, M]` of attention `weights` `[B, H, R, n]` at indices `at` `[B, M]`."""
    return weights.gather(3, at[:, None, None].expand(*weights.shape[:3], -1))


def apply(
    tokens: TokenSelection, prunable: OriginalIds, fixed: Tensor, chosen: Tensor
) -> tuple[TokenSelection, OriginalIds]:
    """Keep the chosen prunable tokens and every fixed one.

    Args:
        tokens: Tokens held now.
        prunable: Original ids of the prunable tokens held now `[B, P]`, ascending.
        fixed: Original ids of the tokens that always stay `[F]`, ascending.
        chosen: Indices `[B, K]` into `prunable`, from `resolve`.

    Returns:
        The tokens held after the cut, and the original ids of the prunable ones among them `[B, K]`.
    """
    kept = OriginalIds(prunable.gather(1, chosen))
    ids = torch.cat([fixed.expand(kept.shape[0], -1), kept], dim=1).sort(dim=1).values
    return TokenSelection(OriginalIds(ids), tokens.n_source), kept
