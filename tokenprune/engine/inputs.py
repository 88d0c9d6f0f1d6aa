"""What a query reads, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from tokenprune.engine.rng import QueryRng
from tokenprune.stages.memory import Slot
from tokenprune.stages.token_context import PastFrames
from tokenprune.tokens.layout_tables import LayoutTables


class ModelInputs(Protocol):
    """Preprocessed observations; each adapter keeps more in its own type.

    Attributes:
        images: Per view, the cropped pixels the patches align to, uint8 `[B, 3, S, S]`.
    """

    images: Mapping[str, Tensor]


@dataclass(frozen=True)
class QueryInputs:
    """Everything a query reads.

    Attributes:
        model: The adapter's inputs.
        slots: Drafts of the environments, one per batch row; what the query remembers is written there.
        past: Frames that each stage looks back at, by its index.
        rng: Random numbers.
        tables: The layout as tensors.
    """

    model: ModelInputs
    slots: Sequence[Slot]
    past: Mapping[int, PastFrames]
    rng: QueryRng
    tables: LayoutTables

    def drafted(self) -> QueryInputs:
        """The same inputs with drafts of the slots, for a query that may fail and then must have changed nothing."""
        return replace(self, slots=[slot.draft() for slot in self.slots])
