"""Attention of the action tokens, logged at the layers that some stage observes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.model.attention import attention_rows
from tokenprune.model.kv_cache import LayerKV
from tokenprune.stages.query_record import ActionAttention
from tokenprune.tokens.selection import CurrentIds, OriginalIds, TokenSelection, key_columns_at


class AttentionLog:
    """Attention of one query's action tokens; repeated passes over the same rows are averaged."""

    def __init__(self, layers: frozenset[int]) -> None:
        """Log attention at these layers."""
        self.layers = layers
        self._prunable: dict[int, OriginalIds] = {}
        self._rows: dict[int, dict[int, list[Tensor]]] = {}

    def add(self, layer: int, behind: int, weights: Tensor, prunable: OriginalIds) -> None:
        """Add attention `[B, H, R, P]` of rows that begin `behind` tokens after the layout."""
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
    """A `Pruner` that cuts nothing and logs the attention of tokens after the layout's.

    Args:
        log: Where attention is added.
        behind: Index of the first token, counted from the end of the layout.
        prunable_at: Returns the original ids `[B, P]` of a layer's prunable tokens.
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
        self, layer: int, hidden: Tensor, tokens: TokenSelection, q: Tensor, kv: LayerKV
    ) -> tuple[Tensor, TokenSelection]:
        """Log the attention of all rows; no mask, since they attend to every key."""
        batch, _, n, _ = q.shape
        self._note_probe(layer, n, kv.k.shape[2])
        rows = CurrentIds(torch.arange(n, device=q.device).expand(batch, n))
        weights = attention_rows(q, kv.k, rows, causal=False)
        prunable = self._prunable_at(layer)
        columns = TokenSelection(kv.ids, kv.ids.shape[1]).to_current(prunable)
        self._log.add(layer, self._behind, key_columns_at(weights, columns), prunable)
        return hidden, tokens
