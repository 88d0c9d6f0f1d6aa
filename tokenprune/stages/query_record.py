"""What `observe` reads after a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tokenprune.stages.memory import StageMemory
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.selection import OriginalIds, TokenSelection


@dataclass(frozen=True, slots=True)
class ActionAttention:
    """Attention of a query's action tokens at one layer.

    Action tokens are the rows named `action` if the layout has them. Otherwise they are the tokens after the prefill:
    an autoregressive decoder's generated tokens, or an action expert's rows, averaged over its flow steps.

    Attributes:
        weights: `[B, H, R, P]` in at least float32; the softmax is over all keys.
        prunable: Original ids of the columns `[B, P]`: the prunable tokens of the layer.
    """

    weights: Tensor
    prunable: OriginalIds


@dataclass(frozen=True, slots=True)
class QueryRecord:
    """One finished query, still on the device.

    Attributes:
        slots: Environments of the batch rows.
        mode: Mode of the query.
        layout: All tokens of the query.
        tokens: Tokens of the last layer.
        actions: Normalised actions `[B, T, D]`.
        attention: Attention of action tokens, by layer; see `StageNeeds.action_attention`.
    """

    slots: tuple[int, ...]
    mode: str
    layout: TokenLayout
    tokens: TokenSelection
    actions: Tensor
    attention: Mapping[int, ActionAttention]
    _tables: LayoutTables
    _memory: StageMemory

    def remember(self, name: str, prunable: OriginalIds, values: Tensor) -> None:
        """Keep values `[B, M]` of prunable tokens (original ids `[B, M]`) for `ctx.recall` in later queries."""
        self._memory.remember(name, self._tables.place[prunable], values)

    def push(self, name: str, prunable: OriginalIds, values: Tensor, depth: int) -> None:
        """Keep values of the last `depth` queries; `ctx.recall` reads the newest as `name.0`, the next as `name.1`."""
        self._memory.push(name, self._tables.place[prunable], values, depth)
