"""A second pass over the same tokens: what stages chose in the first holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tokenprune.kv import LayerKV
from tokenprune.selection import TokenSelection, rows_at


class SameCuts:
    """A `Pruner` that keeps what was kept before and asks nobody."""

    def __init__(self, held: Mapping[int, TokenSelection]) -> None:
        """`held` is what each cut left, by the layer it follows."""
        self._held = held

    def begin(self, embeddings: Tensor) -> tuple[Tensor, TokenSelection]:
        """Embeddings `[B, n, D]` that enter layer 0, of all `[B, N, D]`, and which tokens they are."""
        everything = TokenSelection.identity(embeddings.shape[1], len(embeddings), embeddings.device)
        return self._cut(-1, embeddings, everything)

    def acts_after(self, layer: int) -> bool:
        """Whether a cut follows the layer."""
        return layer in self._held

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Cut as before."""
        return self._cut(layer, hidden, tokens)

    def _cut(self, after: int, hidden: Tensor, tokens: TokenSelection) -> tuple[Tensor, TokenSelection]:
        if after not in self._held:
            return hidden, tokens
        kept = self._held[after]
        return rows_at(hidden, tokens.to_current(kept.ids)), kept
