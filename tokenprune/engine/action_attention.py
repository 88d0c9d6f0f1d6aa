"""The action tokens' attention, kept at the layers that some stage wants to observe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.model.attention import attention_rows
from tokenprune.model.kv_cache import LayerKV
from tokenprune.stages.query_record import ActionAttention
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection


class AttentionLog:
    """Attention of one query's action tokens: rows side by side, repeated passes over the same rows averaged."""

    def __init__(self, layers: frozenset[int]) -> None:
        """Attention is logged at these layers."""
        self.layers = layers
        self._prunable: dict[int, OriginalIds] = {}
        self._rows: dict[int, dict[int, list[Tensor]]] = {}

    def add(self, layer: int, behind: int, weights: Tensor, prunable: OriginalIds) -> None:
        """Add `[B, H, R, P]` of rows whose first is `behind` places behind the layout."""
        self._prunable[layer] = prunable
        self._rows.setdefault(layer, {}).setdefault(behind, []).append(weights)

    def result(self) -> dict[int, ActionAttention]:
        """The attention of each layer."""
        return {
            layer: ActionAttention(
                torch.cat([torch.stack(rows[behind]).mean(0) for behind in sorted(rows)], dim=2), self._prunable[layer]
            )
            for layer, rows in self._rows.items()
        }


class AttentionLogger:
    """A `Pruner` that cuts nothing and logs the attention of tokens behind the layout.

    Args:
        log: Where attention is added.
        behind: Place of the first token behind the layout.
        prunable_at: Original ids `[B, P]` of the prunable tokens a layer holds.
        note_probe: Called with the layer and the numbers of rows and keys whenever attention is computed.
    """

    def __init__(
        self,
        log: AttentionLog,
        behind: int,
        prunable_at: Callable[[int], OriginalIds],
        note_probe: Callable[[int, int, int], None],
    ) -> None:
        self._log = log
        self._behind = behind
        self._prunable_at = prunable_at
        self._note_probe = note_probe

    def acts_after(self, layer: int) -> bool:
        """Whether the layer's attention is logged."""
        return layer in self._log.layers

    def after_layer(
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, seen: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Compute the rows' attention; everything they attend to is before them or among them."""
        batch, _, n, _ = q.shape
        self._note_probe(layer, n, seen.k.shape[2])
        rows = CurrentIds(torch.arange(n, device=q.device).expand(batch, n))
        weights = attention_rows(q, seen.k, rows, causal=False)
        prunable = self._prunable_at(layer)
        columns = TokenSelection(seen.ids, seen.ids.shape[1]).to_current(prunable)
        picked = weights.gather(3, columns[:, None, None].expand(*weights.shape[:3], -1))
        self._log.add(layer, self._behind, picked, prunable)
        return hidden, tokens
