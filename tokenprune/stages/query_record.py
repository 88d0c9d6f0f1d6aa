"""What observers are given after a query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenprune.stages.memory import Slot, remember, shift
from tokenprune.tokens.layout import TokenLayout
from tokenprune.tokens.layout_tables import LayoutTables
from tokenprune.tokens.selection import OriginalIds, TokenSelection


@dataclass(frozen=True, slots=True)
class ActionAttention:
    """Attention of a query's action tokens at one layer.

    Action tokens are the rows named `action` where the layout has them; otherwise those behind it: an autoregressive
    decoder's generated tokens, or an action expert's rows, averaged over its flow steps.

    Attributes:
        weights: `[B, H, R, P]` in at least float32; the softmax is over everything the tokens attend to.
        prunable: Original ids of the columns `[B, P]`, the prunable tokens the layer held.
    """

    weights: Tensor
    prunable: OriginalIds


@dataclass(frozen=True, slots=True)
class QueryRecord:
    """One finished query, still on the device.

    Attributes:
        slots: Environments of the batch rows.
        mode: Mode it ran in.
        layout: Its tokens.
        tokens: What the last layer held.
        actions: Normalised actions `[B, T, D]`.
        attention: By layer, for the layers some stage watches.
        memories: Memory of each environment.
        tables: The layout as tensors.
        scope: Prefix of what the stage remembers.
    """

    slots: tuple[int, ...]
    mode: str
    layout: TokenLayout
    tokens: TokenSelection
    actions: Tensor
    attention: Mapping[int, ActionAttention]
    memories: Sequence[Slot]
    tables: LayoutTables
    scope: str = ""

    def remember(self, name: str, prunable: OriginalIds, values: Tensor) -> None:
        """Keep values `[B, M]` of prunable tokens `[B, M]`, which the stage's `ctx.recall` finds in later queries."""
        places = self.tables.place[prunable]
        remember(self.memories, self.scope + name, places, values, len(self.layout.prunable))

    def push(self, name: str, prunable: OriginalIds, values: Tensor, depth: int) -> None:
        """As `remember`, for the last `depth` queries: `ctx.recall` finds the newest as `name.0`, older ones behind."""
        shift(self.memories, self.scope + name, depth)
        self.remember(f"{name}.0", prunable, values)
